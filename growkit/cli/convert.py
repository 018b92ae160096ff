"""``growkit convert``: the same model in another attention variant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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

PANEL = "Grow"
HOW, OUTPUT = "How", "Output"


def convert(
    checkpoint: CheckpointArgument,
    to: Annotated[str, typer.Option(help="Attention to write; --to help lists them.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", "--output-dir", help="Folder to write.", rich_help_panel=OUTPUT
        ),
    ],
    ratio: Annotated[
        int | None, typer.Option(help="Signal heads a noise head.", rich_help_panel=HOW)
    ] = None,
    mirror: Annotated[
        float | None,
        typer.Option(
            help="Noise heads mirror their signal heads, with this lambda.", rich_help_panel=HOW
        ),
    ] = None,
    symmetry: Annotated[
        str, typer.Option(help="split or even, where heads are copied.", rich_help_panel=HOW)
    ] = "split",
    seed: Annotated[int, typer.Option(help="Of every random number.", rich_help_panel=HOW)] = 0,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an existing checkpoint once the new one is whole.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            help="Do not compare the written folder with the source (the card says so).",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest shard, in bytes with a unit.", rich_help_panel=OUTPUT)
    ] = "5GB",
    revision: RevisionOption = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Convert a checkpoint to another attention variant, and say how exact that is.

    [dim]growkit convert ckpt/ --to gda --ratio 3 --out converted/[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    from growkit.convert import convert_checkpoint
    from growkit.surgery.conversion_request import ConversionRequest

    request = ConversionRequest(to=to, ratio=ratio, mirror=mirror, symmetry=symmetry, seed=seed)
    folder = local_folder(checkpoint, revision, output)
    _, manifest = convert_checkpoint(
        folder,
        out,
        request,
        overwrite=overwrite,
        verify=not no_verify,
        max_shard_size=max_shard_size,
        open_progress=lambda name, total, unit: output.progress(name, total, unit=unit),
        warn=output.warn,
    )
    from growkit.cli.plan_view import plan_tables

    output.show(*plan_tables(manifest["plan"]))
    proof = manifest["verification"]
    output.show(f"verification {proof['summary']}" if proof else "not verified (--no-verify)")
    output.show(f"wrote {out}")
    for message in manifest["plan"]["warnings"]:
        output.warn(message)
    output.result({"out": str(out), **manifest})
