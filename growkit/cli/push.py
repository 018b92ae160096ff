# SPDX-License-Identifier: Apache-2.0
"""``growkit push``: a folder as a model of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from growkit.cli.common import JsonOption, QuietOption, VerboseOption, open_output

PANEL = "Train"


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that growkit grew, converted or trained.")],
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The model's name on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to write to, made where it is not there.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    optimizer: Annotated[
        bool, typer.Option("--optimizer-state", help="Upload growkit_optimizer/ too.")
    ] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder and list the files; send nothing.")
    ] = False,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Upload a folder to the Hugging Face Hub: weights, config, tokenizer, card and licence.

    The token is that of [bold]hf auth login[/bold] or HF_TOKEN. Weights there that the folder does
    not have are removed; what the training left (training/) is not uploaded.

    [dim]growkit push run org/name --private[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    from growkit.checkpoint.push import files_to_push, push_folder
    from growkit.core.quantities import counted, human_bytes

    files = files_to_push(folder, name, optimizer_state=optimizer)
    total = human_bytes(sum(files.values()))
    if dry:
        for file, size in files.items():
            output.show(f"{file}  {human_bytes(size)}")
        output.show(f"would push {counted(len(files), 'file')}, {total}, to {name}")
        output.result({"name": name, "files": files, "url": None, "commit": None})
        return
    output.note(f"Pushing {counted(len(files), 'file')}, {total}, to {name}.")
    url, commit = push_folder(
        folder, name, list(files), private=private, revision=revision, message=message
    )
    output.show(f"pushed {url}")
    output.result({"name": name, "files": files, "url": url, "commit": commit})
