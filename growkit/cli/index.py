# SPDX-License-Identifier: Apache-2.0
"""``growkit index``: an index that fits its shards, and tensor names without a wrapper's prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from growkit.cli.common import JsonOption, QuietOption, VerboseOption, open_output

PANEL = "Look and prove"


def index(
    folder: Annotated[Path, typer.Argument(help="Folder of safetensors shards.")],
    strip_prefix: Annotated[
        str | None,
        typer.Option(
            metavar="PREFIX",
            help="Write another folder, whose tensors lose this prefix of a training wrapper.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write, with --strip-prefix.")
    ] = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Rebuild model.safetensors.index.json from the headers of the shards.

    Weights stay as they are. With --strip-prefix and --out the weights are written into another
    folder under the names that transformers knows.

    [dim]growkit index ckpt/[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    from growkit.checkpoint import rebuild_index
    from growkit.core.errors import UsageError

    if (strip_prefix is None) != (out is None):
        raise UsageError("--strip-prefix and --out belong together.", "Give both or neither.")
    if strip_prefix is not None and out is not None:
        with output.progress("copy", None) as bar:
            made = rebuild_index.strip_prefix(folder, strip_prefix, out, advance=bar.advance)
        output.show(f"wrote {out}: {made['renamed']} of {made['tensors']} tensors renamed")
    else:
        made = rebuild_index.rebuild_index(folder)
        output.show(f"wrote {made['index']}: {made['tensors']} tensors in {made['shards']} shards")
    output.result(made)
