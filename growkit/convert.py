"""A checkpoint in another attention variant: plan, write, prove on the written files, publish."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from growkit.checkpoint import open_checkpoint
from growkit.grow import publish_plan
from growkit.surgery.conversion_plan import build_conversion_plan
from growkit.surgery.conversion_request import ConversionRequest
from growkit.surgery.plan import Plan
from growkit.surgery.tied_head import check_tied_head


def convert_checkpoint(
    source: Path, out: Path, request: ConversionRequest, **writing: Any
) -> tuple[Plan, dict[str, Any]]:
    """Convert a checkpoint folder into ``out``.

    Exact conversions are held to the tolerance of growth; one that is not exact is compared and
    reported. Nothing appears under ``out`` before that.

    Args:
        source: folder of the checkpoint.
        out: folder to write.
        request: to which attention, and how.
        writing: options of :func:`growkit.grow.publish_plan`.

    Returns:
        The plan and the manifest (content of ``growkit.json``).

    Raises:
        UsageError, CheckpointError, GrowkitError: bad request, source or target; nothing written.
        VerificationFailed: the written folder does not compute what its plan promises.
    """
    with open_checkpoint(source) as checkpoint:
        plan = build_conversion_plan(
            checkpoint, request.conversion(), symmetry=request.symmetry_choice()
        )
        if plan.growth.conversion is not None and plan.growth.conversion.measure is not None:
            measured = plan.growth.conversion.measure(checkpoint)
            plan = replace(plan, warnings=(*plan.warnings, *measured))
        check_tied_head(checkpoint, plan.source_family, plan.source_sizes)
        manifest = publish_plan(plan, out, {"convert": request.to_dict()}, **writing)
    return plan, manifest
