"""``growkit recipes``: those that come with growkit, and one for the checkpoint at hand."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from growkit.cli.common import JsonOption, QuietOption, VerboseOption, complete_recipe, open_output

if TYPE_CHECKING:
    from growkit.cli.output import Output

PANEL = "Grow"
NEW_RUN = "new-run"
NEW = "recipes new-run CHECKPOINT"


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Print this recipe's file instead of the list; or new-run.",
            autocompletion=complete_recipe(more=(NEW_RUN,)),
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="With new-run: the folder that the recipe is to train, or a Hub id."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="File or folder of text to train on.", rich_help_panel=NEW),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="New file to write.", rich_help_panel=NEW)
    ] = Path("recipe.yaml"),
    memory: Annotated[
        str, typer.Option(help="Of the accelerator, for the batch size.", rich_help_panel=NEW)
    ] = "24GB",
    every: Annotated[
        bool, typer.Option("--all", help="In the list, say what every study asks too.")
    ] = False,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List the recipes that come with growkit, print one, or write one for a checkpoint.

    [bold]recipes[/bold] lists published growth methods, training runs and studies;
    [bold]recipes NAME[/bold] prints one. [bold]recipes new-run CHECKPOINT[/bold] writes a training
    recipe with the checkpoint's context length, a batch that fits into memory and a learning rate
    by a stated rule, with comments, to be edited.

    [dim]growkit grow ckpt/ --recipe gda-signal-x2 --out grown/[/dim]
    [dim]growkit recipes new-run grown/ --text corpus/ --out recipe.yaml[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    from growkit.core.errors import UsageError

    if name == NEW_RUN:
        if checkpoint is None:
            raise UsageError(
                "new-run needs the checkpoint that is to be trained.",
                "For example: growkit recipes new-run grown/ --text corpus/",
            )
        _new_run(output, checkpoint, text, out, memory)
    elif checkpoint is not None:
        raise UsageError(
            f"growkit recipes takes one name, and {str(checkpoint)!r} is a second one.",
            f"To write a recipe for a checkpoint: growkit recipes new-run {checkpoint}",
        )
    elif name is not None:
        _print_one(output, name)
    else:
        _list(output, every)


def _new_run(output: Output, checkpoint: Path, text: Path | None, out: Path, memory: str) -> None:
    from growkit.advice.new_run import new_run_recipe
    from growkit.checkpoint import parse_size
    from growkit.cli.common import local_folder
    from growkit.core.errors import UsageError
    from growkit.core.yaml_files import parse_yaml

    if out.exists():
        raise UsageError(
            f"--out {str(out)!r} exists already.", "Give the name of a new file; nothing is lost."
        )
    folder = local_folder(checkpoint, None, output)
    content = new_run_recipe(folder, text, parse_size(memory), str(out))
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(content)
    except OSError as error:
        raise UsageError(
            f"--out {str(out)!r} cannot be written: {error.strerror}.",
            "Give a file in a folder that exists.",
        ) from None
    command = f"growkit train {shlex.quote(str(out))} --dry-run"
    output.show(f"wrote {out}", f"next: edit it, then {command}")
    output.result({"out": str(out), "recipe": parse_yaml(content, str(out))})


def _print_one(output: Output, name: str) -> None:
    from growkit.core.printed_text import printable
    from growkit.recipe.shipped import find_recipe, shipped_recipes

    file = find_recipe(Path(name))
    if not output.json_mode:
        text = file.read_text(encoding="utf-8")
        typer.echo(printable(text, keep="\n\t") if sys.stdout.isatty() else text, nl=False)
        return
    output.result(next(r.to_dict() for r in shipped_recipes() if r.path == file))


def _list(output: Output, every: bool) -> None:
    """A line each; of studies, of which there are many, the names alone unless ``every``."""
    from rich.table import Table
    from rich.text import Text

    from growkit.recipe.shipped import KINDS, shipped_recipes

    found = shipped_recipes()
    longest = max(len(recipe.name) for recipe in found)
    for kind in KINDS:
        title = f"{kind}: growkit {kind} {'CKPT --recipe NAME' if kind == 'grow' else 'NAME'}"
        if kind == "study" and not every:
            names = [recipe.name for recipe in found if recipe.kind == kind]
            output.show(Text(f"{title}; --all: what each asks", style="italic"))
            output.show(Text(", ".join(names)))
            continue
        table = Table(
            title=title,
            title_justify="left",
            box=None,
            show_header=False,
        )
        table.add_column("name", no_wrap=True, min_width=longest)
        table.add_column("what", no_wrap=True, overflow="ellipsis")
        for recipe in found:
            if recipe.kind == kind:
                table.add_row(recipe.name, recipe.description.split(". ")[0].rstrip("."))
        output.show(table)
    output.note("growkit recipes NAME prints one, with its source; a file does as well as a name")
    output.note("growkit recipes new-run CKPT --text FILES writes one for your checkpoint")
    output.result([recipe.to_dict() for recipe in found])
