"""``growkit advise``: what to train under a budget, with the source of every choice."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from growkit.cli.common import (
    CheckpointArgument,
    JsonOption,
    QuietOption,
    RevisionOption,
    VerboseOption,
    local_folder,
    open_output,
)

if TYPE_CHECKING:
    from growkit.cli.output import Output

PANEL = "Grow"
MEMORY = "24GB"
BUDGET = "Tokens or training FLOPs: 2e9tokens, 20Mtokens, 3e17flops."


def advise(
    checkpoint: CheckpointArgument,
    budget: Annotated[str, typer.Option(help=BUDGET)],
    text: Annotated[
        Path | None, typer.Option(help="File or folder of text to train on; else the sample.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the staged recipe, in a new file.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Of the accelerator, for the batch.")] = MEMORY,
    revision: RevisionOption = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Propose start depth, time of growth, method and rates for a budget, each with its source.

    A folder with a config.json alone is the model that is wanted in the end; one with weights is
    the small model that grows. [bold]growkit train FILE --dry-run[/bold] checks the recipe.

    [dim]growkit advise target/config --budget 2e9tokens --text corpus/ --out recipe.yaml[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    folder = local_folder(checkpoint, revision, output)
    show_proposal(output, folder, budget, text, out, memory)


def show_proposal(
    output: Output, folder: Path, budget: str, text: Path | None, out: Path | None, memory: str
) -> None:
    """The proposal as lines or JSON, and its recipe in ``out``."""
    from growkit.advice.proposal import as_mapping, proposal_lines, propose, save_proposal
    from growkit.checkpoint import parse_size

    made = propose(folder, budget, text, parse_size(memory))
    if out is not None:
        save_proposal(made, out)
    output.show(*proposal_lines(made))
    if out is not None:
        output.note(f"wrote {out}")
        output.show(f"next: growkit train {shlex.quote(str(out))} --dry-run")
    output.result(dict(as_mapping(made, out)))
