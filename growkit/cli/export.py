"""``growkit export``: a variant as an ordinary checkpoint that every engine serves."""

from __future__ import annotations

from typing import Annotated

import typer

from growkit.cli.common import (
    CheckpointArgument,
    JsonOption,
    NoVerifyOption,
    OutOption,
    OverwriteAllOption,
    OverwriteOption,
    QuietOption,
    RevisionOption,
    ShardSizeOption,
    VerboseOption,
    local_folder,
    open_output,
)

PANEL = "Grow"


def export(
    checkpoint: CheckpointArgument,
    out: OutOption,
    fold: Annotated[
        bool, typer.Option("--fold", help="Fold the variant into grouped-query attention.")
    ] = False,
    format: Annotated[
        str | None, typer.Option(help="mistral, qwen2 or qwen3; default: what holds the model.")
    ] = None,
    overwrite: OverwriteOption = False,
    overwrite_all: OverwriteAllOption = False,
    no_verify: NoVerifyOption = False,
    max_shard_size: ShardSizeOption = "5GB",
    revision: RevisionOption = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Fold GDA (shared keys, no sub-layer norm) or WGQA into an ordinary checkpoint, and prove it.

    [dim]growkit export ckpt/ --fold --out plain/[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    from growkit.core.errors import UsageError

    if not fold:
        raise UsageError("growkit export was not told what to do.", "Give --fold.")
    from growkit.cli.convert import run_conversion
    from growkit.variants.request import ConversionRequest

    request = ConversionRequest(to="plain", format=format)
    folder = local_folder(checkpoint, revision, output)
    run_conversion(
        folder,
        out,
        request,
        output,
        overwrite="all" if overwrite_all else overwrite,
        verify=not no_verify,
        max_shard_size=max_shard_size,
    )
