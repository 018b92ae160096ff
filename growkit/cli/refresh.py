"""``growkit refresh``: the model code of a folder that an older growkit wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from growkit.cli.common import JsonOption, QuietOption, VerboseOption, open_output

PANEL = "Grow"


def refresh(
    folder: Annotated[Path, typer.Argument(help="Folder of a gda, growkit or growkit_t5 model.")],
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Renew the model code in a folder, for newer transformers; weights stay untouched.

    [dim]growkit refresh grown/[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    from growkit.model_code.exported import CHECKED_VERSIONS
    from growkit.model_code.renew import refresh_code

    done = refresh_code(folder)
    checked = ", ".join(CHECKED_VERSIONS)
    if done.written:
        output.note(f"{len(done.written)} files renewed; checked with transformers {checked}")
    else:
        output.note(f"the model code is current; checked with transformers {checked}")
    output.result(done.to_dict())
