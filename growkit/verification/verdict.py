"""From figures to a verdict, and its cause in one sentence.

The choices of a comparison: which are valid, and what holds when nothing was chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from growkit.core.errors import UsageError
from growkit.verification.layers import describe
from growkit.verification.logit_figures import LogitFigures
from growkit.verification.report import (
    CachedSteps,
    ConfigFields,
    Generation,
    LayerDifference,
    LongWindow,
    TableRows,
)
from growkit.verification.tolerance import EXACTNESS
from growkit.verification.written_folder import Folder


@dataclass(frozen=True)
class Outcome:
    """Everything that is judged; ``allowed`` is the tolerance of the ordinary windows."""

    exactness: str
    figures: LogitFigures
    allowed: float
    long: LongWindow | None
    rows: TableRows
    config: ConfigFields
    cached: tuple[CachedSteps, ...]
    generation: Generation | None

    @property
    def same_logits(self) -> bool:
        """Logits and greedy tokens are those of A."""
        return (
            self.figures.max_difference <= self.allowed
            and (self.long is None or self.long.within)
            and (self.generation is None or self.generation.explained)
        )


def verdict(
    outcome: Outcome, compared: list[LayerDifference], classes: tuple[str, str]
) -> tuple[bool | None, str]:
    """The verdict and, for a failure, its cause in one sentence.

    Args:
        classes: of the models of A and of B.
    """
    # A cache that changes what is computed is a defect of B alone, whatever the growth promised.
    broken = _broken_cache(outcome, classes)
    if broken:
        return False, broken
    if outcome.exactness == "not-exact":
        return None, ""
    figures, allowed, long = outcome.figures, outcome.allowed, outcome.long
    where = describe(compared)
    if figures.max_difference > allowed:
        return False, (
            f"The logits differ by up to {figures.max_difference:.3g} (tolerance {allowed:.3g}, "
            f"logits of {figures.logit_rms:.3g} rms)" + (f"; {where}." if where else ".")
        )
    if long is not None and not long.within:
        return False, (
            f"The logits agree in short text, but behind {long.tokens - long.compared:,} tokens "
            f"they differ by up to {long.max_difference:.3g} (tolerance {long.tolerance:.3g}; "
            f"{long.boundary} asks for that length)" + (f"; {where}." if where else ".")
        )
    if outcome.rows.differing:
        return False, f"Rows that the text did not read are wrong: {outcome.rows.differing[0]}."
    if outcome.config.judged and outcome.config.differing:
        return False, (
            f"config.json: {outcome.config.differing[0]}; no window was long enough to show what "
            "that does."
        )
    made = outcome.generation
    if made is not None and not made.explained:
        return False, (
            f"Greedy generation differs from the first folder's at token "
            f"{made.first_disagreement} (logit margin {made.margin:.3g}, tolerance "
            f"{allowed:.3g}), although the logits on the text agree."
        )
    return True, ""


def _broken_cache(outcome: Outcome, classes: tuple[str, str]) -> str:
    """What a KV cache does to B that it does not do to A, of the same class."""
    wrong = {(s.folder, s.cache): s for s in outcome.cached if not s.within}
    for (folder, kind), steps in wrong.items():
        if folder != "b" or steps.as_in_a:
            continue
        what = (
            f"fails: {steps.error}"
            if steps.error
            else f"differs from the forward pass by up to {steps.max_difference:.3g} in the logits "
            f"(tolerance {steps.tolerance:.3g})"
        )
        text = f"Decoding with a {kind} KV cache behind {steps.prefill_tokens:,} tokens {what}"
        if ("a", kind) in wrong and classes[0] == classes[1]:
            return f"{text}; so it does in the first folder, which decodes otherwise again."
        return f"{text}."
    made = outcome.generation
    if made is None or made.as_in_a:
        return ""
    if not made.cache_explained:
        return (
            f"Generation with a KV cache differs from generation without it at token "
            f"{made.first_cache_disagreement} (logit margin {made.margin:.3g}, "
            f"tolerance {outcome.allowed:.3g})."
        )
    if made.max_cache_difference > made.cache_tolerance:
        return (
            f"Generation with a KV cache computes other logits than the forward pass, by up to "
            f"{made.max_cache_difference:.3g} (tolerance {made.cache_tolerance:.3g})."
        )
    return ""


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
