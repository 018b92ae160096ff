"""Where a class itself decodes otherwise than it computes a whole text, B is held to A's decoding.

Decoding with a cache is compared with the forward pass over the same tokens. Some classes of
transformers do not stand that for any weights: their cached indexers choose other keys, or they
take no cache that transformers makes. A growth has kept the function of such a model when B decodes
as A does, and that is what is asked here; where the plan promises another function, it is enough
that A has the fault. Two classes have none in common: a conversion is held to its own forward pass
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from growkit.verification.decoding import greedy, uncached_logits
from growkit.verification.pair import Pair
from growkit.verification.report import CachedSteps, Generation
from growkit.verification.tolerance import root_mean_square


def held_to_a(
    pair: Pair, found: Sequence[CachedSteps], logits: Mapping[tuple[str, str], torch.Tensor]
) -> tuple[CachedSteps, ...]:
    """What was found, and of B's faults whether they are A's.

    Args:
        logits: ``[steps, vocab]`` of each folder and kind of cache, where decoding did not fail.
    """
    of_a = {steps.cache: steps for steps in found if steps.folder == "a" and not steps.within}

    def held(steps: CachedSteps) -> CachedSteps:
        if steps.within or steps.folder == "a" or steps.cache not in of_a or not same_class(pair):
            return steps
        if steps.error and of_a[steps.cache].error:
            return replace(steps, as_in_a=True)
        a, b = (logits.get((folder, steps.cache)) for folder in ("a", "b"))
        if a is None or b is None:
            return steps
        return replace(steps, as_in_a=not pair.preserves or _alike(pair, a, b))

    return tuple(map(held, found))


def generated_as_a(
    pair: Pair, prompt: torch.Tensor, tokens: int, generation: Generation
) -> Generation:
    """A generation whose cache is at fault, and whether A generates the same with its own."""
    if not same_class(pair):
        return generation
    try:
        (sequence_a, logits_a), (sequence_b, logits_b) = (
            greedy(model, prompt, tokens) for model in (pair.model_a, pair.model_b)
        )
    except Exception:  # whatever A's class or its attention kernel raises
        return generation
    if not pair.preserves:
        return replace(generation, as_in_a=_at_fault(pair, prompt, sequence_a, logits_a))
    same = sequence_a[0] == sequence_b[0]
    first = len(same) if bool(same.all()) else int((~same).nonzero()[0])
    # Up to the first token that differs, both were chosen after the same tokens.
    count = min(len(logits_a), first - (len(same) - len(logits_a)) + 1)
    if not _alike(pair, logits_a[:count], logits_b[:count]):
        return generation
    other = None if first == len(same) else count - 1
    return replace(
        generation,
        as_in_a=True,
        equals_a=other is None,
        first_disagreement=other,
        explained=True,
    )


def generates(model: Any, prompt: torch.Tensor) -> bool:
    """Whether a model can generate with a cache at all."""
    try:
        greedy(model, prompt, 2)
    except Exception:  # whatever the class or its attention kernel raises
        return False
    return True


def same_class(pair: Pair) -> bool:
    return type(pair.model_a).__name__ == type(pair.model_b).__name__


def notes_of(pair: Pair, cached: Sequence[CachedSteps], made: Generation | None) -> list[str]:
    """Faults that B shares with A, as sentences."""
    own = f"in both folders alike: {type(pair.model_b).__name__}'s own fault"
    sentences = []
    for steps in cached:
        if steps.as_in_a:
            off = f"is off the forward pass by {steps.max_difference or 0:.3g}"
            what = f"fails ({steps.error})" if steps.error else off
            sentences.append(f"decoding with a {steps.cache} cache {what}, {own}")
    if made is not None and made.as_in_a:
        off = f"is off the forward pass by {made.max_cache_difference:.3g}"
        sentences.append(f"generation with a cache {off}, {own}")
    return sentences


def _alike(pair: Pair, a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    allowed, difference = pair.allowed(root_mean_square(a)), _largest(a, b)
    return difference <= allowed or difference <= allowed * pair.amplification("a")


def _at_fault(pair: Pair, prompt: torch.Tensor, sequence: torch.Tensor, a: torch.Tensor) -> bool:
    """Whether A's logits with a cache are others than without one."""
    expected = uncached_logits(pair.model_a, prompt, sequence, len(a))
    allowed = pair.allowed_cached("a", expected) * pair.amplification("a")
    return _largest(a, expected) > allowed


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nan_to_num((a.double() - b.double()).abs(), nan=torch.inf).max())
