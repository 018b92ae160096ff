"""A checkpoint in another attention variant: plan, write, verify the files, publish."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from growkit.checkpoint import open_checkpoint
from growkit.core.progress import SILENT, Reporter
from growkit.growing import WriteOptions, publish_plan, verifier
from growkit.surgery.effect import ModelShape
from growkit.surgery.plan import Plan, build_conversion_plan
from growkit.surgery.source_checks import check_tied_head
from growkit.variants.gqa.aligned import Aligned, check_alignable
from growkit.variants.gqa.alignment import FILE, Alignment
from growkit.variants.request import ConversionRequest


def convert_checkpoint(
    source: Path,
    out: Path,
    request: ConversionRequest,
    *,
    calibration_text: str | None = None,
    reporter: Reporter = SILENT,
    **writing: Any,
) -> tuple[Plan, dict[str, Any]]:
    """Convert a checkpoint folder into ``out``.

    Exact conversions are held to the tolerance of growth; one that is not exact is compared and
    reported. Nothing appears under ``out`` before that.

    Args:
        source: folder of the checkpoint.
        out: folder to write.
        request: to which attention, and how.
        calibration_text: that ``merge="aligned"`` looks at; default the built-in sample.
        reporter: shows progress and warnings.
        writing: fields of :class:`growkit.growing.WriteOptions`.

    Returns:
        The plan and the manifest (content of ``growkit.json``).

    Raises:
        UsageError, CheckpointError, GrowkitError: bad request, source or target; nothing written.
        VerificationFailed: the written folder does not compute what its plan promises.
    """
    options = WriteOptions(**writing)
    side_files: dict[str, bytes] = {}
    with verifier(options) as worker, open_checkpoint(source) as checkpoint:
        plan = build_conversion_plan(
            checkpoint, request.conversion(), symmetry=request.symmetry_choice()
        )
        if request.merge == "aligned":
            alignment = _calibrated(plan, calibration_text, reporter)
            plan = build_conversion_plan(
                checkpoint,
                Aligned(request.conversion(), alignment),
                symmetry=request.symmetry_choice(),
            )
            side_files = {FILE: alignment.to_bytes()}
        if plan.growth.measure is not None:
            measured = plan.growth.measure(checkpoint)
            plan = replace(plan, warnings=(*plan.warnings, *measured))
        check_tied_head(checkpoint, plan.source_family, plan.source_sizes)
        asked = {"convert": request.to_dict()}
        manifest = publish_plan(
            plan, out, asked, options, worker, reporter=reporter, side_files=side_files
        )
    return plan, manifest


def _calibrated(plan: Plan, text: str | None, reporter: Reporter) -> Alignment:
    """The alignment of the plan's merge; imports torch once the request is known to fit."""
    shape = ModelShape(plan.source_family, plan.source_sizes, plan.checkpoint.config)
    check_alignable(shape)
    from growkit.evaluation.head_alignment import calibrate

    heads = plan.config["num_key_value_heads"]
    with reporter.progress("calibrate", 100, unit="%") as bar:
        return calibrate(plan.checkpoint, shape, heads, text, bar)
