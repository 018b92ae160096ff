"""``growkit export``: a variant as an ordinary checkpoint that every engine serves; a folder as a
torch distributed checkpoint (DCP), and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from growkit.checkpoint.side_files import Overwrite
    from growkit.cli.output import Output

PANEL = "Grow"
TARGETS = ("dcp", "safetensors")


def export(
    checkpoint: CheckpointArgument,
    out: OutOption,
    fold: Annotated[
        bool, typer.Option("--fold", help="Fold the variant into grouped-query attention.")
    ] = False,
    format: Annotated[
        str | None, typer.Option(help="mistral, qwen2 or qwen3; default: what holds the model.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="dcp: a torch distributed checkpoint; safetensors: one as an ordinary folder."
        ),
    ] = None,
    names: Annotated[
        str, typer.Option(help="With --to dcp: transformers, or torchtitan (llama, qwen3).")
    ] = "transformers",
    like: Annotated[
        Path | None,
        typer.Option(help="With --to safetensors: the folder that the training started from."),
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
    """Fold GDA (shared keys, no sub-layer norm) or WGQA into an ordinary checkpoint, and prove it;
    or write a folder as a torch distributed checkpoint (torchtitan, FSDP scripts), and back.

    [dim]growkit export ckpt/ --fold --out plain/[/dim]

    [dim]growkit export ckpt/ --to dcp --out dcp/[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    from growkit.core.errors import UsageError

    wanted: Overwrite = "all" if overwrite_all else overwrite
    if fold and to is not None:
        raise UsageError("--fold and --to are two exports.", "Give one of them.")
    if to is not None:
        _to(checkpoint, out, to, names, like, wanted, revision, max_shard_size, output)
        return
    if not fold:
        raise UsageError("growkit export was not told what to do.", "Give --fold, or --to dcp.")
    from growkit.cli.convert import run_conversion
    from growkit.variants.request import ConversionRequest

    request = ConversionRequest(to="plain", format=format)
    folder = local_folder(checkpoint, revision, output)
    run_conversion(
        folder,
        out,
        request,
        output,
        overwrite=wanted,
        verify=not no_verify,
        max_shard_size=max_shard_size,
    )


def _to(
    checkpoint: Path,
    out: Path,
    to: str,
    names: str,
    like: Path | None,
    overwrite: Overwrite,
    revision: str | None,
    max_shard_size: str,
    output: Output,
) -> None:
    """Into a torch distributed checkpoint, or out of one."""
    from growkit.core.errors import UsageError
    from growkit.core.quantities import human_bytes

    if to not in TARGETS:
        raise UsageError(f"--to {to!r} is no export.", f"Give one of {', '.join(TARGETS)}.")
    from growkit.training.parallel.dcp_folder import NAMES, export_dcp, import_dcp

    if names not in NAMES:
        raise UsageError(f"--names {names!r} is not known.", f"Give one of {', '.join(NAMES)}.")
    if to == "dcp":
        folder = local_folder(checkpoint, revision, output)
        done = export_dcp(folder, out, names=names, overwrite=overwrite, reporter=output)
    elif like is None:
        raise UsageError(
            "--to safetensors needs the model that the weights are of.",
            "Give --like FOLDER: what the training started from.",
        )
    else:
        done = import_dcp(
            checkpoint,
            out,
            like,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            reporter=output,
        )
    output.show(
        f"wrote {out}: {done['tensors']} tensors, {human_bytes(done['bytes'])}, in the names of "
        f"{done['names']}"
    )
    output.result(done)
