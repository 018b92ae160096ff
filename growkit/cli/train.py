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
    from growkit.advice.dry_run import DryRun
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
    dry: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check the recipe, count text, steps and memory; write nothing."
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
    if dry:
        from growkit.advice.dry_run import dry_run

        throughput = Throughput(tokens_per_second, flops_per_second)
        done = dry_run(loaded, target, resume=resume, overwrite=overwrite, reporter=output)
        _show_dry_run(output, done, target, loaded, throughput)
        output.show(f"next: {_without_dry_run(recipe, target)}")
        output.result(done.to_dict())
        return
    output.note(f"Training into {target}.")
    if first:
        rows, findings = _advice(loaded, Throughput(tokens_per_second, flops_per_second))
        for line in (*(f"{label}: {value}" for label, value in rows), *findings):
            output.note(f"  {line}")
    result = run(loaded, target, resume=resume, overwrite=overwrite, reporter=output)
    if first:
        show(output, result)
        output.result(result.to_dict())
    if "RANK" in os.environ:
        from growkit.training.parallel.processes import leave

        leave()


def _without_dry_run(recipe: Path, target: Path) -> str:
    """The command that was given, without the switch."""
    import sys

    words = [word for word in sys.argv[1:] if word != "--dry-run"]
    if words[:1] != ["train"]:
        words = ["train", str(recipe), "--out", str(target)]
    return shlex.join(["growkit", *words])


def _show_dry_run(
    output: Output, done: DryRun, target: Path, recipe: Recipe, throughput: Throughput
) -> None:
    """What the run would come to, as rows that wrap."""
    from rich.table import Table

    from growkit.core.quantities import counted, human_bytes, human_count

    table = Table(title=f"dry run: {target}", title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    section, text, steps = recipe.training, done.text, recipe.total_steps
    begin = recipe.model.checkpoint or f"from scratch ({(recipe.model.config or {})['model_type']})"
    table.add_row("output", done.out)
    table.add_row("model", f"{begin}, {human_count(done.parameters)} parameters")
    files = counted(text.files, "file") if text.files else "the built-in text"
    size = f"{files}, {human_bytes(text.size)}, about {human_count(text.tokens)} tokens"
    sample = f" ({text.bytes_per_token:.2f} bytes per token in a sample)"
    table.add_row("text", size + sample * bool(text.bytes_per_token))
    if done.held_out_tokens:
        part = f"{recipe.data.eval_fraction:.3g}"
        table.add_row("held out", f"{part} of it, about {human_count(done.held_out_tokens)} tokens")
    table.add_row(
        "steps",
        f"{steps:,} of {recipe.tokens_per_step:,} tokens "
        f"({recipe.sequences_per_step} x {recipe.data.sequence_length}): "
        f"{human_count(steps * recipe.tokens_per_step)} tokens, the text about {done.passes:.2f} "
        "times",
    )
    schedule = f"peak {section.learning_rate:g}, {section.schedule}, "
    schedule += f"warm-up {counted(recipe.steps(section.warmup_steps), 'step')}"
    if section.schedule == "wsd":
        schedule += f", decay {counted(recipe.steps(section.decay_steps), 'step')}"
    table.add_row("learning rate", schedule)
    table.add_row(
        "every",
        f"{counted(section.logging_steps, 'step')} a log line, {section.eval_steps:,} an "
        f"evaluation, {section.save_steps:,} a checkpoint",
    )
    if recipe.stages:
        table.add_row("growths", f"{len(recipe.stages)}, planned one after another")
    if recipe.model.checkpoint is None:
        total = human_bytes(done.memory.total)
        table.add_row("memory per process", f"{total} and activations")
    rows, findings = _advice(recipe, throughput)
    for label, value in rows:
        table.add_row(label, value)
    memory = done.memory
    if memory.gathered and memory.activations:
        table.add_row(
            "peak per process",
            f"{human_bytes(memory.peak)}, of it {human_bytes(memory.activations)} activations of "
            "one forward pass",
        )
    output.show(table, *findings)


def _advice(recipe: Recipe, throughput: Throughput) -> tuple[list[tuple[str, str]], list[str]]:
    """What is known before the first step, rows and findings; nothing for one from scratch."""
    from growkit.advice import advise, facts_of_recipe
    from growkit.cli.advice_view import advice_rows, finding_lines
    from growkit.core.errors import GrowkitError

    try:
        facts = facts_of_recipe(recipe)
    except GrowkitError:
        return [], []  # a folder that cannot be read is the run's to refuse
    if facts is None:
        return [], []
    advice = advise(facts, throughput)
    return advice_rows(advice), finding_lines(advice)


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
        rows.add_row("training loss (nats per token)", f"{result.loss:.4f}")
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
