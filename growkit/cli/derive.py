"""``growkit derive``: a table for a model type that growkit has none for, proven on a twin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

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
from growkit.cli.output import Output

PANEL = "Look and prove"


def derive(
    checkpoint: CheckpointArgument,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run the model code that the folder brings.")
    ] = False,
    revision: RevisionOption = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Derive what can grow from the model's class, and prove it on a small twin.

    [dim]growkit derive ckpt/[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    folder = local_folder(checkpoint, revision, output, weights=False)
    from growkit.checkpoint import open_checkpoint
    from growkit.derive.derivation import derive_from_json

    with open_checkpoint(folder, require_tensors=False) as source:
        config = dict(source.config)
    own = folder if trust_remote_code and "auto_map" in config else None
    table, path = derive_from_json(config, _steps(output), folder=own)
    if not (json_mode or quiet):
        output.show(_shown(table))
        output.note(f"kept in {path}")
    output.result({"table": str(path), "operators": table["operators"]})


def derive_once(config: Mapping[str, Any], output: Output | None) -> None:
    """Derive a table for a config that no table fits, for the command that found so."""
    from growkit.derive.derivation import derive_from_json, read_config

    read = read_config(config)  # an unknown type ends here, with nothing announced
    if output is not None:
        output.note(
            f"growkit has no table for {config.get('model_type')!r}: it is derived from the class "
            "now, once (a minute or two), and kept"
        )
    _, path = derive_from_json(config, _steps(output), read=read)
    if output is not None:
        output.note(f"derived: {path}")


def _steps(output: Output | None) -> Any:
    if output is None:
        return lambda text: None
    return lambda text: output.note(f"deriving: {text}")


def _shown(table: dict[str, Any]) -> Any:
    from rich.table import Table

    shown = Table(
        title=f"{table['model_type']}, derived with transformers {table['transformers']}",
        title_justify="left",
    )
    for column in ("growth", "proven", "relative error", "control"):
        shown.add_column(column, overflow="fold")
    for option, proof in table["operators"].items():
        if "why" in proof:
            shown.add_row(option, f"no: {proof['why']}", "", "")
        else:
            shown.add_row(option, "yes", f"{proof['error']:.1e}", f"{proof['control']:.2g}")
    return shown
