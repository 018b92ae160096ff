"""``growkit verify``: do two written checkpoints compute the same?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from growkit.cli.common import (
    CheckpointArgument,
    JsonOption,
    QuietOption,
    RevisionOption,
    VerboseOption,
    local_folders,
    open_output,
)

if TYPE_CHECKING:
    from rich.table import Table

    from growkit.verification import CachedSteps, LongWindow, VerificationReport

PANEL = "Look and prove"


def verify(
    a: CheckpointArgument,
    b: CheckpointArgument,
    text: Annotated[
        Path | None, typer.Option(help="Text to compare on; default: a built-in English sample.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="About how many tokens to compare on.")] = 512,
    window: Annotated[int, typer.Option(help="Tokens in one window of the text.")] = 128,
    long_window: Annotated[
        int | None,
        typer.Option(
            help="Tokens of one longer window, 0 for none; default: longer than every sliding "
            "window, chunk and rotary scaling, where that is affordable."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows that run at once.")] = 1,
    compute_dtype: Annotated[
        str,
        typer.Option(help="auto, float32, float64, bfloat16 or float16; auto is float32 or wider."),
    ] = "auto",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest allowed logit difference; default: from dtype and depth."),
    ] = None,
    layerwise: Annotated[
        str,
        typer.Option(help="auto, on or off: hold one layer at a time where two models do not fit."),
    ] = "auto",
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Print the figures; a difference is no failure.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that a folder brings.")
    ] = False,
    revision: RevisionOption = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare two written checkpoints on real text; exit 3 when they differ.

    [dim]growkit verify ckpt/ grown/[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    a, b = local_folders((a, b), revision, output)
    from growkit.core.worker import importing

    with importing():
        from growkit.verification import verify_checkpoints
        from growkit.verification.windows import read_text

    given = None if text is None else read_text(text)
    with output.progress("verify", 100, unit="%") as progress:
        report = verify_checkpoints(
            a,
            b,
            text=given,
            tokens=tokens,
            window=window,
            long_window=long_window,
            batch_size=batch_size,
            compute_dtype=compute_dtype,
            tolerance=tolerance,
            layerwise=layerwise,
            all_layers=verbose,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    output.show(table(report))
    if report.layers:
        output.show(layer_table(report))
    for note in report.notes:
        output.warn(note)
    output.result(report.to_dict())
    if not report_only:
        report.raise_if_failed()


def table(report: VerificationReport) -> Table:
    """The figures, one a row."""
    from rich.table import Table
    from rich.text import Text

    from growkit.core.printed_text import printable

    colour = {True: "green", False: "red", None: "yellow"}[report.passed]
    names = f": {report.a} against {report.b}"
    rows = Table(title=Text.assemble((report.status, colour), printable(names)))
    rows.add_column("figure")
    rows.add_column("value", justify="right")
    rows.add_row("compared on", f"{report.text}, {report.tokenizer}")
    for place, part in enumerate(report.compared.split("; ")):
        rows.add_row("" if place else "compared", part)
    rows.add_row("stored as", f"{report.storage_dtype_a}, {report.storage_dtype_b}")
    how = " layer by layer" if report.layerwise else ""
    rows.add_row("computed in", report.compute_dtype + how)
    rows.add_row("growth promised to be", report.exactness)
    rows.add_row("max |d logit|", f"{report.max_difference:.3g}")
    rows.add_row("  tolerance", f"{report.tolerance:.3g}")
    rows.add_row("mean |d logit|", f"{report.mean_difference:.3g}")
    rows.add_row("logits of A, rms and max", f"{report.logit_rms:.3g}, {report.logit_max:.3g}")
    if report.output:
        rows.add_row("compared output", report.output)
    else:
        rows.add_row("KL(A||B) a token, mean and max", f"{report.kl_mean:.3g}, {report.kl_max:.3g}")
        rows.add_row("top-1 agreement", f"{report.top1_agreement:.2%}")
        rows.add_row("perplexity A, B", f"{report.perplexity_a:.4f}, {report.perplexity_b:.4f}")
    if report.long_window is not None:
        long = report.long_window
        rows.add_row(f"max |d logit| behind {long.tokens - long.compared:,} tokens", _figure(long))
    for steps in report.cached:
        name = f"max |d logit| with {steps.cache} cache, {steps.folder.upper()}"
        shared = " (and A's)" if steps.as_in_a else ""
        rows.add_row(name, (printable(steps.error) or _figure(steps)) + shared)
    if report.generation is not None:
        made = report.generation
        cache = "equal" if made.cached_equals_uncached else _at(made.first_cache_disagreement)
        other = "equal" if made.equals_a else _at(made.first_disagreement)
        rows.add_row(f"{made.tokens} greedy tokens, B cached and not", cache)
        rows.add_row(f"{made.tokens} greedy tokens, A and B", other)
        if made.margin is not None:
            rows.add_row("  logit margin there", f"{made.margin:.3g}")
    if report.half_precision is not None:
        half = report.half_precision
        rows.add_row(f"max |d logit| in {half.dtype} compute", f"{half.max_difference:.3g}")
        rows.add_row(
            f"  A in {half.dtype} against {report.compute_dtype}", f"{half.noise_floor:.3g}"
        )
    return rows


def layer_table(report: VerificationReport) -> Table:
    """The residual stream after every compared layer."""
    from rich.table import Table

    rows = Table(title="residual stream")
    for heading in ("layer of B", "layer of A", "max |d|", "relative", "tolerance"):
        rows.add_column(heading, justify="right")
    for layer in report.layers:
        pair = ("embedding" if i < 0 else str(i) for i in (layer.layer, layer.source))
        names = [f"{layer.stack} {name}".strip() for name in pair]
        style = "" if layer.within else "red"
        figures = (layer.max_difference, layer.relative_difference, layer.tolerance)
        rows.add_row(*names, *(f"{figure:.3g}" for figure in figures), style=style)
    return rows


def _figure(found: LongWindow | CachedSteps) -> str:
    return f"{found.max_difference:.3g} (tolerance {found.tolerance:.3g})"


def _at(token: int | None) -> str:
    return f"differ at token {token}"
