"""``growkit grow``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from growkit.cli.common import (
    OUTPUT_PANEL,
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
    next_steps,
    open_output,
    wrote,
)
from growkit.cli.growth_options import growth_options

if TYPE_CHECKING:
    from growkit.surgery.request import GrowthRequest

PANEL = "Grow"


@growth_options
def grow(
    checkpoint: CheckpointArgument,
    request: GrowthRequest,
    out: OutOption,
    overwrite: OverwriteOption = False,
    overwrite_all: OverwriteAllOption = False,
    no_verify: NoVerifyOption = False,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to verify on; default: a built-in English sample."),
    ] = None,
    max_shard_size: ShardSizeOption = "5GB",
    hash_content: Annotated[
        bool,
        typer.Option(
            "--hash",
            help="Record a hash of the source's weights (reads them once more).",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    optimizer_from: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run's optimizer state, when it is not beside the weights.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Writing threads; default: two a core.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = None,
    revision: RevisionOption = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Grow a checkpoint, prove that the written files compute the same, publish the folder.

    [dim]growkit grow ckpt/ --signal-heads x2 --out grown/[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    folder = local_folder(checkpoint, revision, output)
    from growkit.growing import grow_checkpoint

    given = None
    if text is not None and not no_verify:
        from growkit.verification.windows import read_text

        given = read_text(text)
    before = len(output.warnings)
    plan, manifest = grow_checkpoint(
        folder,
        out,
        request,
        overwrite="all" if overwrite_all else overwrite,
        verify=not no_verify,
        text=given,
        hash_content=hash_content,
        optimizer_from=optimizer_from,
        max_shard_size=max_shard_size,
        threads=threads,
        reporter=output,
    )
    warnings = output.warnings[before:]
    if not (json_mode or quiet):
        from growkit.cli.plan_view import plan_tables

        output.show(*plan_tables(manifest["plan"]))
        proof = manifest["verification"]
        output.show(f"verification {proof['summary']}" if proof else "not verified (--no-verify)")
        if "optimizer_state" in manifest:
            output.show(manifest["optimizer_state"]["summary"])
    for message in manifest["plan"]["warnings"]:
        output.warn(message)
    output.show(wrote(out, manifest), *next_steps(out, manifest, plan.config))
    output.result({"out": str(out), "warnings": warnings, **manifest})
