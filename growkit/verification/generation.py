"""Greedy generation of B with its KV cache, against B without a cache and against A.

Tokens and, between B and itself, logits: the route that ``generate()`` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from growkit.core.errors import VerificationFailed
from growkit.verification.inputs import cache_keyword, is_encoder_decoder, start_token
from growkit.verification.report import Generation
from growkit.verification.routing import RepeatedChoices


def compare_generation(
    model_a: Any,
    model_b: Any,
    prompt: torch.Tensor,
    tokens: int,
    tolerance: float,
    cache_tolerance: Callable[[torch.Tensor], float],
    choices: RepeatedChoices,
) -> Generation:
    """Generate ``tokens`` greedy tokens with B's cache after ``prompt`` ``[1, length]``.

    An encoder-decoder generates an answer to the prompt.

    What A and B without a cache would have generated takes one pass of each over the result: as
    long as every token is the best one after those before it, greedy generation gives the same
    tokens, and the first that is not is where it parts.

    Args:
        tolerance: largest rounding between a logit of A and of B.
        cache_tolerance: the same between B's logits with and without a cache, from the latter.
        choices: experts of B, where it has any.

    Raises:
        VerificationFailed: B cannot generate at all.
    """
    with choices.watched():
        choices.forget()
        sequence, cached = _greedy(model_b, prompt, tokens)
        given = 1 if is_encoder_decoder(model_b) else prompt.shape[1]
        chosen = sequence[0, given:]
        choices.following = 0
        uncached = _uncached(model_b, prompt, sequence, len(chosen))
    cache_at, cache_margin = _first_disagreement(uncached, chosen)
    other_at, other_margin = _first_disagreement(
        _uncached(model_a, prompt, sequence, len(chosen)), chosen
    )
    margins = [margin for margin in (cache_margin, other_margin) if margin is not None]
    difference = torch.nan_to_num((cached.double() - uncached.double()).abs(), nan=torch.inf)
    return Generation(
        prompt_tokens=prompt.shape[1],
        tokens=len(chosen),
        cached_equals_uncached=cache_at is None,
        equals_a=other_at is None,
        first_cache_disagreement=cache_at,
        first_disagreement=other_at,
        margin=max(margins, default=None),
        cache_explained=cache_margin is None or cache_margin <= 2 * tolerance,
        explained=all(margin <= 2 * tolerance for margin in margins),
        max_cache_difference=float(difference.max()),
        cache_tolerance=cache_tolerance(uncached),
    )


def _uncached(model: Any, prompt: torch.Tensor, sequence: torch.Tensor, count: int) -> torch.Tensor:
    """Logits ``[count, vocab]`` from which the last tokens of a sequence would be chosen."""
    ids = {"input_ids": sequence[:, :-1]}
    if is_encoder_decoder(model):
        ids = {"input_ids": prompt, "decoder_input_ids": sequence[:, :-1]}
    logits: torch.Tensor = model(**ids, use_cache=False).logits[0, -count:].float()
    return logits


def _first_disagreement(
    logits: torch.Tensor, chosen: torch.Tensor
) -> tuple[int | None, float | None]:
    """Where the model would choose another token, and by how many logits it prefers that one."""
    margins = logits.max(-1).values - logits.gather(-1, chosen[:, None])[:, 0]
    wrong = (logits.argmax(-1) != chosen).nonzero()
    return (int(wrong[0]), float(margins[wrong[0]])) if len(wrong) else (None, None)


def _greedy(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and new tokens ``[1, length + tokens]``; the folder's sampling settings are unused.
    And the logits ``[tokens, vocab]`` that they were chosen from.

    Of an encoder-decoder: start token and new tokens ``[1, 1 + tokens]``.
    """
    from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

    # No end-of-text id is set either, so that always `tokens` tokens are compared.
    settings, cache = GenerationConfig(pad_token_id=0), {}
    if is_encoder_decoder(model):
        settings.decoder_start_token_id = start_token(model)
        # generate() would make T5's cache for as many layers as the encoder has.
        own = EncoderDecoderCache(DynamicCache(), DynamicCache())
        cache = {cache_keyword(model): own}
    saved, model.generation_config = model.generation_config, settings
    try:
        result = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            **cache,
        )
    except Exception as error:  # an uneven cache raises whatever the attention kernel raises
        raise VerificationFailed(
            f"Generation with a KV cache fails in the second folder: {error}.",
            "The model's cache layout or layer indices are wrong.",
        ) from error
    finally:
        model.generation_config = saved
    return result.sequences, torch.cat(result.logits)
