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
CAVEAT = (
    "The loss continues without a jump: the grown model starts as the same function. A run this "
    "short does not show which model is better in the end."
)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the four models go.")] = Path(
        "checkpoints/demo"
    ),
    steps: Annotated[
        int, typer.Option(min=4, help="Steps before growth; half as many follow it.")
    ] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of initialization and sample order.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew instead of going on.")
    ] = False,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a small model, double its signal heads, prove it, train on beside the ungrown one.

    Takes a few minutes on two cores; when it is interrupted, the same command continues.

    [dim]growkit demo[/dim]
    """
    output = open_output(json_mode, quiet, verbose)

    from growkit.training.demo import DemoSettings, run_demo

    settings = DemoSettings(steps=steps, continue_steps=max(steps // 2, 2), seed=seed)
    result = run_demo(out, settings, overwrite=overwrite, reporter=output)
    output.show(table(result), CAVEAT)
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
    headings = ("para-\nmeters", "tokens\nseen", "before\ngrowth", "\nstep 0", "after\ntraining")
    for heading in (*headings, "per-\nplexity"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for model in result.models:
        before = model.loss_before_growth
        rows.add_row(
            model.name,
            f"{model.parameters / 1e6:.3f} M",
            f"{model.tokens:,}",
            "" if before is None else f"{before:.5f}",
            f"{model.loss_at_start:.5f}",
            f"{model.loss_at_end:.4f}",
            f"{model.perplexity:.2f}",
        )
    proof = "passed" if result.verification["passed"] else "not passed"
    rows.caption = f"verification {proof}; loss changed by {result.jump:+.1e} at the growth"
    return rows
