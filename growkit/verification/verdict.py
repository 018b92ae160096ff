"""From figures to a verdict, and its cause in one sentence."""

from __future__ import annotations

from dataclasses import dataclass

from growkit.verification.figures import LogitFigures
from growkit.verification.layers import describe
from growkit.verification.report import (
    CachedSteps,
    ConfigFields,
    Generation,
    LayerDifference,
    LongWindow,
    TableRows,
)


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
    """What a KV cache does to B; and whether A, of the same class, has the same fault."""
    wrong = {(s.folder, s.cache): s for s in outcome.cached if not s.within}
    for (folder, kind), steps in wrong.items():
        if folder != "b":
            continue
        what = (
            f"fails: {steps.error}"
            if steps.error
            else f"differs from the forward pass by up to {steps.max_difference:.3g} in the logits "
            f"(tolerance {steps.tolerance:.3g})"
        )
        text = f"Decoding with a {kind} KV cache behind {steps.prefill_tokens:,} tokens {what}"
        if ("a", kind) in wrong and classes[0] == classes[1]:
            return (
                f"{text}; so it does in the first folder: the fault is {classes[1]}'s or "
                "transformers', not the growth's."
            )
        return f"{text}."
    made = outcome.generation
    if made is None:
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
