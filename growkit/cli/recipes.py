"""``growkit recipes``: those that come with growkit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from growkit.cli.common import JsonOption, QuietOption, VerboseOption, complete_recipe, open_output

PANEL = "Grow"


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Print this recipe's file instead of the list.", autocompletion=complete_recipe()
        ),
    ] = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List the recipes that come with growkit: published growth methods, training runs and
    studies.

    [dim]growkit grow ckpt/ --recipe gda-signal-x2 --out grown/[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    from growkit.core.terminal_text import printable
    from growkit.recipe.shipped import KINDS, find_recipe, shipped_recipes

    if name is not None:
        file = find_recipe(Path(name))
        if not json_mode:
            text = file.read_text(encoding="utf-8")
            typer.echo(printable(text, keep="\n\t") if sys.stdout.isatty() else text, nl=False)
            return
        output.result(next(r.to_dict() for r in shipped_recipes() if r.path == file))
        return
    from rich.table import Table

    found = shipped_recipes()
    longest = max(len(recipe.name) for recipe in found)
    for kind in KINDS:
        table = Table(
            title=f"{kind}: growkit {kind} {'CKPT --recipe NAME' if kind == 'grow' else 'NAME'}",
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
    output.result([recipe.to_dict() for recipe in found])
