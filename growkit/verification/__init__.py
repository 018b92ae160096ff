"""Proof on written files: two checkpoint folders, loaded by transformers, compute the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from growkit.core.progress import Progress
from growkit.verification.comparison import verify_checkpoints
from growkit.verification.report import (
    CachedSteps,
    Generation,
    LayerDifference,
    LongWindow,
    VerificationReport,
)
from growkit.verification.tolerance import tolerance

__all__ = [
    "CachedSteps",
    "Generation",
    "LayerDifference",
    "LongWindow",
    "VerificationReport",
    "tolerance",
    "verification_record",
    "verify_checkpoints",
]

# Every one reads all weights again, and is compared by logits; caches are held to the forward pass
# before.
GENERATED_WHEN_WRITTEN = 8


def verification_record(
    a: Path, b: Path, *, name: str, text: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Verify a folder that was written a moment ago; what growkit.json says of it.

    Args:
        name: that ``b`` will have.

    Raises:
        VerificationFailed: and all else that :func:`verify_checkpoints` raises.
    """
    report = verify_checkpoints(
        a, b, text=text, generate_tokens=GENERATED_WHEN_WRITTEN, progress=progress
    )
    report = replace(report, b=name, cause=report.cause.replace(b.name, name))
    report.raise_if_failed()
    return {**report.to_dict(), "summary": report.summary()}
