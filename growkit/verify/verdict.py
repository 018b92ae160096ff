"""From figures to a verdict, and its cause in one sentence."""

from __future__ import annotations

from growkit.verify.figures import LogitFigures
from growkit.verify.layers import describe
from growkit.verify.report import Generation, LayerDifference


def verdict(
    exactness: str,
    figures: LogitFigures,
    allowed: float,
    generation: Generation | None,
    compared: list[LayerDifference],
) -> tuple[bool | None, str]:
    """The verdict and, for a failure, its cause in one sentence."""
    # A cache that changes the tokens is a defect of B alone, whatever the growth promised.
    if generation is not None and not generation.cache_explained:
        return False, (
            f"Generation with a KV cache differs from generation without it at token "
            f"{generation.first_cache_disagreement} (logit margin {generation.margin:.3g}, "
            f"tolerance {allowed:.3g})."
        )
    if exactness == "not-exact":
        return None, ""
    if figures.max_difference > allowed:
        where = describe(compared)
        return False, (
            f"The logits differ by up to {figures.max_difference:.3g} (tolerance {allowed:.3g}, "
            f"logits of {figures.logit_rms:.3g} rms)" + (f"; {where}." if where else ".")
        )
    if generation is not None and not generation.explained:
        return False, (
            f"Greedy generation differs from the first folder's at token "
            f"{generation.first_disagreement} (logit margin {generation.margin:.3g}, tolerance "
            f"{allowed:.3g}), although the logits on the text agree."
        )
    return True, ""
