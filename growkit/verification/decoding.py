"""Decoding with a cache: single steps against one pass, and greedy generation.

Decoding with a KV cache against the forward pass over the whole text: logits, not tokens.

A cache that is ignored, shifted or filled in another order can leave greedy tokens as they are.

Greedy generation of B with its KV cache, against B without a cache and against A.

Tokens and, between B and itself, logits: the route that ``generate()`` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from growkit.core.errors import VerificationFailed
from growkit.verification import model_inputs as inputs
from growkit.verification.loading import reason
from growkit.verification.model_inputs import cache_keyword, is_encoder_decoder, start_token
from growkit.verification.report import CachedSteps, Generation
from growkit.verification.routing import RepeatedChoices
from growkit.verification.shared_layers import SharedLayers

STEPS = 4  # single tokens behind the prefill
KINDS = ("dynamic", "static")

Forward = Callable[[torch.Tensor], torch.Tensor]


def cached_steps(
    model: Any,
    ids: torch.Tensor,
    whole: torch.Tensor,
    kind: str,
    *,
    folder: str,
    tolerance: float,
    choices: RepeatedChoices,
) -> tuple[CachedSteps, list[torch.Tensor]]:
    """Prefill all but the last tokens of ``ids`` ``[1, length]``, then feed those one by one.

    The logits of the prefill's last token and of every step are compared with those of the forward
    pass without a cache.

    Args:
        whole: its logits ``[1, positions, vocab]``, of at least the last ``STEPS + 1`` positions.
        kind: ``dynamic`` or ``static``.
        folder: ``a`` or ``b``, for the report.
        choices: experts of the forward pass, where there are any.

    Returns:
        What was found, and the logits ``[vocab]`` of every comparison.
    """
    text, forward = _cached(model, ids, kind)
    steps = min(STEPS, text.shape[1] - 1)
    start = text.shape[1] - steps
    found: list[float] = []
    logits: list[torch.Tensor] = []
    error = ""
    try:
        position = 0
        for part in (text[:, :start], *text[:, start:].split(1, dim=1)):
            choices.following = position
            position += part.shape[1]
            expected = whole[0, whole.shape[1] - text.shape[1] + position - 1]
            logits.append(forward(part)[0, -1])
            difference = (logits[-1].double() - expected.double()).abs()
            found.append(float(torch.nan_to_num(difference, nan=torch.inf).max()))
    except Exception as raised:  # whatever the class or its attention kernel raises
        error = reason(raised)
    finally:
        choices.following = None
    steps_found = CachedSteps(
        folder=folder,
        cache=kind,
        prefill_tokens=start,
        steps=steps,
        max_difference=max(found) if found and not error else None,
        tolerance=tolerance,
        error=error,
    )
    return steps_found, logits


def supports(model: Any, kind: str) -> bool:
    """transformers says that the class decodes with this kind of cache; GPT-1 takes none."""
    if inputs.own_cache_keyword(model) is None and not inputs.takes_cache(model):
        return False
    # A static cache is what graphs are compiled for; older versions have a flag of its own.
    flags = ("_can_compile_fullgraph", "_supports_static_cache")
    return kind == "dynamic" or any(getattr(model, flag, False) for flag in flags)


def _cached(model: Any, ids: torch.Tensor, kind: str) -> tuple[torch.Tensor, Forward]:
    """The tokens that the decoder reads, and its forward pass with one cache."""
    given = inputs.arguments(model, ids) | {"use_cache": True}
    text = inputs.predicted_ids(model, ids)
    own = inputs.own_cache_keyword(model)
    if own is not None:
        name = "input_ids"
    elif not inputs.is_encoder_decoder(model):
        given[inputs.cache_keyword(model)] = _cache(model.config, kind, text.shape[1])
        name = "input_ids"
    else:
        from transformers import EncoderDecoderCache

        read = inputs.main_input(model)
        encoded = model.get_encoder()(**{read: given.pop(read)})
        # The decoder's own config: it may have another number of layers than the encoder.
        config = model.get_decoder().config
        given[inputs.cache_keyword(model)] = EncoderDecoderCache(
            _cache(config, kind, text.shape[1]), _cache(config, kind, encoded[0].shape[1])
        )
        given["encoder_outputs"] = encoded
        name = "decoder_input_ids"

    def forward(part: torch.Tensor) -> torch.Tensor:
        output = model(**given | {name: part})
        if own is not None:
            given[own] = getattr(output, own)
        logits: torch.Tensor = output.logits
        return logits

    return text, forward


def _cache(config: Any, kind: str, length: int) -> Any:
    from transformers import DynamicCache, StaticCache

    config = config.get_text_config(decoder=True)
    if kind == "dynamic":
        return DynamicCache(config=config)
    return StaticCache(config=config, max_cache_len=length)


def compare_generation(
    model_a: Any,
    model_b: Any,
    prompt: torch.Tensor,
    tokens: int,
    tolerance: float,
    cache_tolerance: Callable[[torch.Tensor], float],
    choices: RepeatedChoices,
    shared: SharedLayers,
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
        shared: layers of B that are layers of A.

    Raises:
        VerificationFailed: B cannot generate at all.
    """
    with choices.watched():
        choices.forget()
        try:
            sequence, cached = greedy(model_b, prompt, tokens)
        except Exception as error:  # an uneven cache raises whatever the attention kernel raises
            raise VerificationFailed(
                f"Generation with a KV cache fails in the second folder: {error}.",
                "The model's cache layout or layer indices are wrong.",
            ) from error
        given = 1 if is_encoder_decoder(model_b) else prompt.shape[1]
        chosen = sequence[0, given:]
        choices.following = 0
        with shared.pass_of("b", first=True):
            uncached = uncached_logits(model_b, prompt, sequence, len(chosen))
    with shared.pass_of("a", first=False):
        other = uncached_logits(model_a, prompt, sequence, len(chosen))
    cache_at, cache_margin = _first_disagreement(uncached, chosen)
    other_at, other_margin = _first_disagreement(other, chosen)
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


def uncached_logits(
    model: Any, prompt: torch.Tensor, sequence: torch.Tensor, count: int
) -> torch.Tensor:
    """Logits ``[count, vocab]`` from which the last tokens of a sequence would be chosen."""
    ids: dict[str, Any] = {"input_ids": sequence[:, :-1]}
    if is_encoder_decoder(model):
        source = inputs.source_arguments(model, prompt)
        ids = {**source, "decoder_input_ids": sequence[:, :-1]}
    logits: torch.Tensor = model(**ids, use_cache=False).logits[0, -count:].float()
    return logits


def _first_disagreement(
    logits: torch.Tensor, chosen: torch.Tensor
) -> tuple[int | None, float | None]:
    """Where the model would choose another token, and by how many logits it prefers that one."""
    margins = logits.max(-1).values - logits.gather(-1, chosen[:, None])[:, 0]
    wrong = (logits.argmax(-1) != chosen).nonzero()
    return (int(wrong[0]), float(margins[wrong[0]])) if len(wrong) else (None, None)


def greedy(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and new tokens ``[1, length + tokens]``; the folder's sampling settings are unused.
    And the logits ``[tokens, vocab]`` that they were chosen from.

    Of an encoder-decoder: start token and new tokens ``[1, 1 + tokens]``. Raises whatever the class
    raises where it cannot generate with a cache.
    """
    from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, GenerationMixin

    # No end-of-text id is set either, so that always `tokens` tokens are compared.
    settings, cache = GenerationConfig(pad_token_id=0), {}
    if is_encoder_decoder(model):
        settings.decoder_start_token_id = start_token(model)
        # generate() would make T5's cache for as many layers as the encoder has.
        cache = {cache_keyword(model): EncoderDecoderCache(DynamicCache(), DynamicCache())}
    given = inputs.source_arguments(model, prompt)
    if "input_ids" in given:
        given["attention_mask"] = torch.ones_like(prompt)
    # Classes that transcribe speech have a generate() of their own, with further settings.
    own = inputs.is_encoder_decoder(model) and "input_ids" not in given
    make = partial(GenerationMixin.generate, model) if own else model.generate
    saved, model.generation_config = model.generation_config, settings
    try:
        result = make(
            **given,
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            **cache,
        )
    finally:
        model.generation_config = saved
    return result.sequences, torch.cat(result.logits)
