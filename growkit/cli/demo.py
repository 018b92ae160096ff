"""``growkit demo``: the main job end to end on the text that comes with growkit."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from growkit.cli.common import JsonOption, QuietOption, VerboseOption, open_output

if TYPE_CHECKING:
    from rich.table import Table

    from growkit.training.demo import DemoResult

PANEL = "Train"
# A smaller difference than this, of one seed, is not worth a sentence that names a winner.
SHOWN = 0.02


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the models go.")] = Path(
        "checkpoints/demo"
    ),
    steps: Annotated[
        int, typer.Option(min=4, help="Steps before growth; a fifth as many follow it.")
    ] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Of initialization and sample order.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew instead of going on.")
    ] = False,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train one layer, grow it late to six and twice the signal heads, verify, compare with from
    scratch.

    Takes under four minutes on two cores; when it is interrupted, the same command continues.

    [dim]growkit demo[/dim]
    """
    output = open_output(json_mode, quiet, verbose)

    from growkit.training.demo import DemoSettings, run_demo

    after = max(steps // 5, 2)
    settings = DemoSettings(steps=steps, grown_steps=after, decay_steps=after // 2, seed=seed)
    result = run_demo(out, settings, overwrite=overwrite, reporter=output)
    output.show(table(result), conclusion(result))
    output.show(f"plot: {result.plot}" if result.plot else "no plot: install growkit[plots]")
    output.show(f"figures: {result.out / 'demo.json'}")
    base, grown, trained = (
        shlex.quote(str(result.out / name)) for name in ("base", "grown", "grown-trained")
    )
    output.show(f"next: growkit inspect {trained}", f"      growkit verify {base} {grown}")
    output.result(result.to_dict())


def table(result: DemoResult) -> Table:
    """The models side by side."""
    from rich.table import Table

    rows = Table(title="held-out loss in nats per token")
    rows.add_column("model", min_width=18)
    for heading in ("para-\nmeters", "tokens\nread", "training\nFLOPs", "step 0", "at the\nend"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for model in result.models:
        rows.add_row(
            model.name,
            f"{model.parameters / 1e6:.3f} M",
            f"{model.tokens:,}",
            f"{model.flops:.3g}",
            f"{model.loss_at_start:.4f}",
            f"{model.loss_at_end:.4f}",
        )
    proof = "passed" if result.verification["passed"] else "not passed"
    rows.caption = f"verification {proof}; loss changed by {result.jump:+.1e} at the growth"
    return rows


def conclusion(result: DemoResult) -> str:
    """The difference at equal FLOPs in a sentence, and what it cannot say."""
    less = -result.difference
    if abs(less) < SHOWN:
        return (
            f"At equal training FLOPs the two end within {SHOWN} nats per token ({-less:+.4f}): a "
            "run this short shows no difference. docs/results.md has the studies that ask."
        )
    where = "below" if less > 0 else "above"
    return (
        f"At equal training FLOPs the grown model ends {abs(less):.3f} nats per token {where} the "
        "one from scratch. That is one seed of a short run; docs/results.md has the studies."
    )
