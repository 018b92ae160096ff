"""Option types that several commands share, and the sink that each command opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from growkit.cli.output import Output

CheckpointArgument = Annotated[
    Path, typer.Argument(help="Folder of a Hugging Face checkpoint (config.json + safetensors).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show tracebacks and more detail.")
]


def open_output(json_mode: bool, quiet: bool, verbose: bool) -> Output:
    """The sink of this run; remembered so that the error handler prints the same way."""
    global current
    current = Output(json_mode=json_mode, quiet=quiet, verbose=verbose)
    return current


current: Output | None = None
