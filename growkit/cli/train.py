"""``growkit train``: continual pretraining of a checkpoint on local text."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from growkit.cli.common import (
    FlopsPerSecondOption,
    JsonOption,
    QuietOption,
    TokensPerSecondOption,
    VerboseOption,
    complete_recipe,
    complete_words,
    open_output,
)
from growkit.cli.output import Output

if TYPE_CHECKING:
    from growkit.advice import Throughput
    from growkit.training.recipe import Recipe
    from growkit.training.run_result import TrainingResult

PANEL = "Train"


def train(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="YAML recipe, or a name from 'growkit recipes'.",
            autocompletion=complete_recipe("train"),
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Output folder; default: the recipe's, or its name."),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Instead of the recipe's number of steps.")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto (newest whole checkpoint), never, or a checkpoint folder.",
            autocompletion=complete_words("auto", "never"),
        ),
    ] = "auto",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value of the recipe."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Throw away an earlier run in the output folder.")
    ] = False,
    grow_now: Annotated[
        bool,
        typer.Option(
            "--grow-now", help="Ask the staged run in the output folder to grow at its next step."
        ),
    ] = False,
    tokens_per_second: TokensPerSecondOption = None,
    flops_per_second: FlopsPerSecondOption = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a checkpoint on (or a small model from scratch); the same command resumes it.

    [dim]growkit train recipes/train-gda-small.yaml --out checkpoints/small[/dim]
    """
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    output = open_output(json_mode and first, quiet or not first, verbose)
    from growkit.advice import Throughput
    from growkit.recipe.shipped import find_recipe
    from growkit.training import load_recipe
    from growkit.training import train as run

    recipe = find_recipe(recipe, "train")
    loaded = load_recipe(recipe, overrides or [], max_steps)
    target = out or loaded.out or Path("checkpoints") / recipe.stem
    if grow_now:
        from growkit.training.growth.stage_end import ask_for_growth

        ask_for_growth(target)
        output.note(f"The run in {target} grows at the end of its next step.")
        return
    output.note(f"Training into {target}.")
    if first:
        _advise(output, loaded, Throughput(tokens_per_second, flops_per_second))
    result = run(loaded, target, resume=resume, overwrite=overwrite, reporter=output)
    if first:
        show(output, result)
        output.result(result.to_dict())
    if "RANK" in os.environ:
        from growkit.training.parallel.processes import leave

        leave()


def _advise(output: Output, recipe: Recipe, throughput: Throughput) -> None:
    """What is known before the first step; nothing for a model from scratch."""
    from growkit.advice import advise, facts_of_recipe
    from growkit.cli.advice_view import advice_rows, finding_lines
    from growkit.core.errors import GrowkitError

    try:
        facts = facts_of_recipe(recipe)
    except GrowkitError:
        return  # a folder that cannot be read is the run's to refuse
    if facts is None:
        return
    advice = advise(facts, throughput)
    for label, value in advice_rows(advice):
        output.note(f"  {label}: {value}")
    for line in finding_lines(advice):
        output.note(f"  {line}")


def show(output: Output, result: TrainingResult) -> None:
    """The figures of a finished run, and the next command."""
    from rich.table import Table

    rows = Table(title=f"trained: {result.out}")
    rows.add_column("figure")
    rows.add_column("value", justify="right")
    rows.add_row("steps", f"{result.steps:,}")
    rows.add_row("tokens", f"{result.tokens:,}")
    rows.add_row("parameters", f"{result.parameters:,}")
    if result.loss is not None:
        rows.add_row("training loss (nats a token)", f"{result.loss:.4f}")
    if result.eval_loss is not None and result.perplexity is not None:
        rows.add_row("held-out loss", f"{result.eval_loss:.4f}")
        rows.add_row("held-out perplexity", f"{result.perplexity:.3f}")
    if result.bits_per_byte is not None:
        rows.add_row("held-out bits per byte", f"{result.bits_per_byte:.3f}")
    rows.add_row("seconds", f"{result.seconds:.1f}")
    output.show(rows)
    output.note(f"metrics: {result.metrics}")
    if result.plot is not None:
        output.note(f"plot: {result.plot}")
    output.note(f"next: growkit report {shlex.quote(str(result.out))}")
