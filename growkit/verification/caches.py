"""Decoding of B with each kind of cache, and generation with one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from growkit.core.errors import VerificationFailed
from growkit.verification import model_inputs as inputs
from growkit.verification import own_faults
from growkit.verification.decoding import KINDS, cached_steps, compare_generation, supports
from growkit.verification.long_window import Reach, is_dynamic, position_limit
from growkit.verification.pair import Pair
from growkit.verification.report import CachedSteps, Generation
from growkit.verification.routing import RepeatedChoices, routers
from growkit.verification.steps import Whole, whole_pass

CACHED_TOKENS = 64  # behind which caches are compared where no config field asks for more


def compare_caches(
    pair: Pair, windows: torch.Tensor, long: torch.Tensor | None, whole: Whole, reach: Reach
) -> tuple[CachedSteps, ...]:
    """Decoding of B with each cache, behind the longest window that is affordable and needed.

    A is decoded too where B is wrong: the fault may be the class's, see
    :mod:`growkit.verification.own_faults`.
    """
    # Without a boundary a cache is right or wrong at any length.
    ids = windows[:1, : None if reach.boundary else CACHED_TOKENS] if long is None else long
    models = (pair.model_a, pair.model_b)
    if dynamic := [model for model in models if is_dynamic(model.config.to_dict())]:
        # Beyond it the class itself gives cached keys another rotation than a whole text.
        limit = min(int(model.config.max_position_embeddings) for model in dynamic)
        ids = windows[:1, :limit]
    found: list[CachedSteps] = []
    decoded: dict[tuple[str, str], torch.Tensor] = {}
    for folder in ("b", "a"):
        if found and all(steps.within for steps in found):
            break
        model = pair.model(folder)
        begun = None if ids is long else _begun(pair, folder, ids)
        for kind in KINDS:
            if not supports(model, kind):
                if folder == "b":
                    pair.notes.append(
                        f"no {kind} cache: {type(model).__name__} does not support one"
                    )
                continue
            if begun is not None:
                steps, _ = _steps(pair, folder, ids, kind, begun)
                if steps.within:
                    found.append(steps)
                    continue
                begun = None  # a class that reads ahead: what follows the text is to be left out
            if folder not in whole:
                positions = inputs.predicted_ids(model, ids).shape[1]
                whole = {folder: whole_pass(pair, folder, ids, positions)}
            steps, logits = _steps(pair, folder, ids, kind, whole[folder])
            if not steps.within and not steps.error:
                decoded[folder, kind] = torch.stack(logits)
                steps = replace(steps, tolerance=steps.tolerance * pair.amplification(folder))
            found.append(steps)
    return own_faults.held_to_a(pair, found, decoded)


def _steps(
    pair: Pair,
    folder: str,
    ids: torch.Tensor,
    kind: str,
    whole: tuple[torch.Tensor, RepeatedChoices],
) -> tuple[CachedSteps, list[torch.Tensor]]:
    logits, choices = whole
    allowed = pair.allowed_cached(folder, logits)
    model = pair.model(folder)
    return cached_steps(model, ids, logits, kind, folder=folder, tolerance=allowed, choices=choices)


def _begun(
    pair: Pair, folder: str, ids: torch.Tensor
) -> tuple[torch.Tensor, RepeatedChoices] | None:
    """Logits of the tokens that the first window begins with, from the pass over all of it; None
    where there are none, or experts that were chosen in it would be needed."""
    model, logits = pair.model(folder), pair.first.get(folder)
    if logits is None or inputs.is_encoder_decoder(model) or routers(model):
        return None
    return logits[:1, : ids.shape[1]], RepeatedChoices(model, pair.compute)


def generate(pair: Pair, windows: torch.Tensor, tokens: int, allowed: float) -> Generation | None:
    """Greedy generation, within the positions that the models have.

    None where the class of both cannot generate with a cache, which is noted.

    Raises:
        VerificationFailed: B alone cannot.
    """
    limits = [position_limit(model) for model in (pair.model_a, pair.model_b)]
    limit = min([windows.shape[1] + tokens, *(n for n in limits if n is not None)])
    tokens = min(tokens, max(1, limit // 2))
    prompt = windows[:1, : max(1, min(32, windows.shape[1], limit - tokens))]
    try:
        generation = compare_generation(
            pair.model_a,
            pair.model_b,
            prompt,
            tokens,
            allowed,
            partial(pair.allowed_cached, "b"),
            RepeatedChoices(pair.model_b, pair.compute),
            pair.shared,
        )
    except VerificationFailed as failure:
        if not own_faults.same_class(pair) or own_faults.generates(pair.model_a, prompt):
            raise
        pair.notes.append(f"generation not compared, the first folder has none: {failure.cause}")
        return None
    if generation.max_cache_difference > generation.cache_tolerance:
        widened = generation.cache_tolerance * pair.amplification("b")
        generation = replace(generation, cache_tolerance=widened)
    if generation.max_cache_difference > generation.cache_tolerance:
        return own_faults.generated_as_a(pair, prompt, tokens, generation)
    return generation
