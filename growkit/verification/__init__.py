"""Proof on written files: two checkpoint folders, loaded by transformers, compute the same."""

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
    "verify_checkpoints",
]
