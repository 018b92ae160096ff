"""The choices of a comparison: which are valid, and what holds when nothing was chosen."""

from __future__ import annotations

import math

import torch

from growkit.core.errors import UsageError
from growkit.verification.folder import Folder
from growkit.verification.tolerance import EXACTNESS

COMPUTE_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LAYERWISE = ("auto", "on", "off")


def check_options(
    tokens: int,
    window: int,
    batch_size: int,
    compute_dtype: str,
    limit: float | None,
    layerwise: str,
    exactness: str | None,
) -> None:
    choices = (
        ("--compute-dtype", compute_dtype, tuple(COMPUTE_DTYPES)),
        ("--layerwise", layerwise, LAYERWISE),
        ("exactness", exactness or "exact", EXACTNESS),
    )
    for option, value, valid in choices:
        if value not in valid:
            raise UsageError(f"{option} {value!r} is not known.", f"Choose {', '.join(valid)}.")
    for option, number, least in (
        ("--tokens", tokens, 2),
        ("--window", window, 2),
        ("--batch-size", batch_size, 1),
    ):
        if number < least:
            raise UsageError(f"{option} {number} is too small.", f"Give {least} or more.")
    if limit is not None and not (math.isfinite(limit) and limit >= 0):
        raise UsageError(f"--tolerance {limit} is no tolerance.", "Give a number of 0 or more.")


def check_long_window(length: int | None) -> None:
    """Raises UsageError for a length that is no window."""
    if length is not None and (length < 0 or length == 1):
        raise UsageError(
            f"--long-window {length} is no window.", "Give 0 for none, or 2 tokens or more."
        )


def promised_exactness(b: Folder, notes: list[str]) -> str:
    """What the plan in B's manifest promises; ``exact`` without a plan."""
    said = b.plan.get("exactness", "exact")
    if said in EXACTNESS:
        return str(said)
    notes.append(f"growkit.json says exactness {said!r}, which is not known: held to 'exact'")
    return "exact"


def widest_dtype(a: Folder, b: Folder) -> torch.dtype:
    return torch.float64 if torch.float64 in (a.storage_dtype, b.storage_dtype) else torch.float32
