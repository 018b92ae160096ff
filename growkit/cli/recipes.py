"""``growkit recipes``: those that come with growkit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from growkit.cli.common import JsonOption, QuietOption, VerboseOption, open_output

PANEL = "Grow"


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe's file instead of the list.")
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
    from growkit.recipe.shipped import find_recipe, shipped_recipes

    if name is not None:
        file = find_recipe(Path(name))
        if not json_mode:
            text = file.read_text(encoding="utf-8")
            typer.echo(printable(text, keep="\n\t") if sys.stdout.isatty() else text, nl=False)
            return
        output.result(next(r.to_dict() for r in shipped_recipes() if r.path == file))
        return
    from rich.table import Table
    from rich.text import Text

    found = shipped_recipes()
    table = Table(title="recipes", title_justify="left", show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("what, and what for", overflow="fold")
    table.add_column("source", overflow="fold")
    for recipe in found:
        said = f"{recipe.description}\n{recipe.purpose}".strip()
        called = Text.assemble(f"{recipe.name}\n", (recipe.kind, "dim"))
        table.add_row(called, said, recipe.source)
    output.show(table)
    output.note("growkit recipes NAME prints one; --recipe takes a name or a file")
    output.result([recipe.to_dict() for recipe in found])
