"""``growkit convert``: the same model in another attention variant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    complete_words,
    local_folder,
    open_output,
    wrote,
)
from growkit.core.errors import UsageError

if TYPE_CHECKING:
    from growkit.cli.output import Output
    from growkit.variants.request import ConversionRequest

PANEL = "Grow"
HOW = "How"
TARGETS = (
    "mha, gqa, mqa, gda, gda_gated, diff_v1, diffllama, unilm_diff_v1, diff_v2, shared_diff, wgqa, "
    "sas, or plain (see growkit export)."
)


def convert(
    checkpoint: CheckpointArgument,
    to: Annotated[
        str,
        typer.Option(
            help=TARGETS,
            autocompletion=complete_words(*TARGETS.partition(" or ")[0].strip(", ").split(", ")),
        ),
    ],
    out: OutOption,
    ratio: Annotated[
        int | None,
        typer.Option(help="Signal heads a noise head (gda, gda_gated).", rich_help_panel=HOW),
    ] = None,
    mirror: Annotated[
        float | None,
        typer.Option(
            help="Mirrored second maps with this lambda (gda 1:1, shared_diff).",
            rich_help_panel=HOW,
        ),
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(help="Key/value heads (gqa), merged heads (wgqa).", rich_help_panel=HOW),
    ] = None,
    merge: Annotated[
        str,
        typer.Option(
            help="How key/value heads are merged: mean, first, or aligned (turned towards each "
            "other on a text, then the mean).",
            rich_help_panel=HOW,
        ),
    ] = "mean",
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text that --merge aligned is calibrated on; default: a built-in one.",
            rich_help_panel=HOW,
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the updates (shared_diff).", rich_help_panel=HOW)
    ] = None,
    key_rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the keys' updates (shared_diff); default: --rank from DIFF V1, else 0, "
            "which leaves the keys and the KV cache as they are.",
            rich_help_panel=HOW,
        ),
    ] = None,
    wgqa_weights: Annotated[
        str, typer.Option(help="scalar, column or row.", rich_help_panel=HOW)
    ] = "scalar",
    simulated_heads: Annotated[
        int, typer.Option(help="Simulated heads a head (sas).", rich_help_panel=HOW)
    ] = 2,
    simulated_head_dim: Annotated[
        int | None, typer.Option(help="Features of a simulated head (sas).", rich_help_panel=HOW)
    ] = None,
    kernel: Annotated[
        int, typer.Option(help="Kernel of the head convolutions (sas), odd.", rich_help_panel=HOW)
    ] = 1,
    symmetry: Annotated[
        str, typer.Option(help="split or even, where heads are copied.", rich_help_panel=HOW)
    ] = "split",
    seed: Annotated[int, typer.Option(help="Of every random number.", rich_help_panel=HOW)] = 0,
    overwrite: OverwriteOption = False,
    overwrite_all: OverwriteAllOption = False,
    no_verify: NoVerifyOption = False,
    max_shard_size: ShardSizeOption = "5GB",
    revision: RevisionOption = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Convert a checkpoint to another attention variant, and say how exact that is.

    [dim]growkit convert ckpt/ --to gda --ratio 3 --out converted/[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    from growkit.variants.request import ConversionRequest

    request = ConversionRequest(
        to=to,
        ratio=ratio,
        mirror=mirror,
        kv_heads=kv_heads,
        merge=merge,
        rank=rank,
        key_rank=key_rank,
        wgqa_weights=wgqa_weights,
        simulated_heads=simulated_heads,
        simulated_head_dim=simulated_head_dim,
        kernel=kernel,
        symmetry=symmetry,
        seed=seed,
    )
    if text is not None and merge != "aligned":
        raise UsageError("--text is read by --merge aligned only.", "Add --merge aligned.")
    given = None if text is None else _read_text(text)
    folder = local_folder(checkpoint, revision, output)
    run_conversion(
        folder,
        out,
        request,
        output,
        overwrite="all" if overwrite_all else overwrite,
        verify=not no_verify,
        max_shard_size=max_shard_size,
        calibration_text=given,
    )


def _read_text(path: Path) -> str:
    from growkit.verification.windows import read_text

    return read_text(path)


def run_conversion(
    folder: Path, out: Path, request: ConversionRequest, output: Output, **writing: Any
) -> None:
    """Convert, and show plan, proof and warnings."""
    from growkit.cli.plan_view import plan_tables
    from growkit.converting import convert_checkpoint

    _, manifest = convert_checkpoint(
        folder,
        out,
        request,
        reporter=output,
        **writing,
    )
    output.show(*plan_tables(manifest["plan"]))
    proof = manifest["verification"]
    output.show(f"verification {proof['summary']}" if proof else "not verified (--no-verify)")
    for message in manifest["plan"]["warnings"]:
        output.warn(message)
    output.show(wrote(out, manifest))
    output.result({"out": str(out), **manifest})
