"""Greedy generation: B with its KV cache, B without, and A."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from growkit.errors import VerificationFailed
from growkit.verify.report import Generation


def compare_generation(
    model_a: nn.Module, model_b: nn.Module, prompt: torch.Tensor, tokens: int, tolerance: float
) -> Generation:
    """Generate ``tokens`` greedy tokens after ``prompt`` ``[1, length]`` three times.

    Raises:
        VerificationFailed: a model cannot generate at all.
    """
    ids_a, scores_a = _greedy(model_a, prompt, tokens, use_cache=True, name="the first folder")
    cached, _ = _greedy(model_b, prompt, tokens, use_cache=True, name="the second folder")
    uncached, plain = _greedy(model_b, prompt, tokens, use_cache=False, name="the second folder")
    cache_at, other_at = _first_difference(cached, uncached), _first_difference(cached, ids_a)
    margin, explained = None, True
    if other_at is not None:
        margin = _margin(scores_a, ids_a, cached, other_at)
        explained = margin <= 2 * tolerance
    if cache_at is not None:
        cache_margin = _margin(plain, uncached, cached, cache_at)
        explained = explained and cache_margin <= 2 * tolerance
        margin = cache_margin if margin is None else margin
    return Generation(
        prompt_tokens=prompt.shape[1],
        tokens=len(cached),
        cached_equals_uncached=cache_at is None,
        equals_a=other_at is None,
        first_cache_disagreement=cache_at,
        first_disagreement=other_at,
        margin=margin,
        explained=explained,
    )


def _first_difference(a: list[int], b: list[int]) -> int | None:
    return next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), None)


def _margin(scores: list[torch.Tensor], own: list[int], other: list[int], at: int) -> float:
    """How much the reference prefers its own token to the other model's, in logits."""
    return float(scores[at][own[at]] - scores[at][other[at]])


def _greedy(
    model: Any, prompt: torch.Tensor, tokens: int, *, use_cache: bool, name: str
) -> tuple[list[int], list[torch.Tensor]]:
    """Token ids and their logits ``[vocab]``; the folder's sampling settings play no part."""
    from transformers import GenerationConfig

    # An end-of-text id would stop the two at different lengths only if they already differ; none
    # is set, so that always `tokens` tokens are compared.
    saved, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
    try:
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=use_cache,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            ),
        )
    except Exception as error:  # an uneven cache raises whatever the attention kernel raises
        how = "with" if use_cache else "without"
        raise VerificationFailed(
            f"Generation {how} a KV cache fails in {name}: {error}.",
            "The model's cache layout or layer indices are wrong.",
        ) from error
    finally:
        model.generation_config = saved
    ids = output.sequences[0, prompt.shape[1] :].tolist()
    return ids, [step[0].float() for step in output.logits]
