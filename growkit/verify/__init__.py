"""Proof on written files: two checkpoint folders, loaded by transformers, compute the same."""

from growkit.verify.report import (
    CachedSteps,
    Generation,
    LayerDifference,
    LongWindow,
    VerificationReport,
)
from growkit.verify.run import verify_checkpoints
from growkit.verify.tolerance import tolerance

__all__ = [
    "CachedSteps",
    "Generation",
    "LayerDifference",
    "LongWindow",
    "VerificationReport",
    "tolerance",
    "verify_checkpoints",
]
