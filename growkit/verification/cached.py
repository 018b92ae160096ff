"""Decoding with a KV cache against the forward pass over the whole text: logits, not tokens.

A cache that is ignored, shifted or filled in another order can leave greedy tokens as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from growkit.verification import inputs
from growkit.verification.loading import reason
from growkit.verification.report import CachedSteps
from growkit.verification.routing import RepeatedChoices

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
) -> CachedSteps:
    """Prefill all but the last tokens of ``ids`` ``[1, length]``, then feed those one by one.

    The logits of the prefill's last token and of every step are compared with those of the forward
    pass without a cache.

    Args:
        whole: its logits ``[1, positions, vocab]``, of at least the last ``STEPS + 1`` positions.
        kind: ``dynamic`` or ``static``.
        folder: ``a`` or ``b``, for the report.
        choices: experts of the forward pass, where there are any.
    """
    text, forward = _cached(model, ids, kind)
    steps = min(STEPS, text.shape[1] - 1)
    start = text.shape[1] - steps
    found: list[float] = []
    error = ""
    try:
        position = 0
        for part in (text[:, :start], *text[:, start:].split(1, dim=1)):
            choices.following = position
            position += part.shape[1]
            expected = whole[0, whole.shape[1] - text.shape[1] + position - 1]
            difference = (forward(part)[0, -1].double() - expected.double()).abs()
            found.append(float(torch.nan_to_num(difference, nan=torch.inf).max()))
    except Exception as raised:  # whatever the class or its attention kernel raises
        error = reason(raised)
    finally:
        choices.following = None
    return CachedSteps(
        folder=folder,
        cache=kind,
        prefill_tokens=start,
        steps=steps,
        max_difference=max(found) if found and not error else None,
        tolerance=tolerance,
        error=error,
    )


def supports(model: Any, kind: str) -> bool:
    """transformers says that the class decodes with this kind of cache."""
    # A static cache is what graphs are compiled for; older versions have a flag of its own.
    flags = ("_can_compile_fullgraph", "_supports_static_cache")
    return kind == "dynamic" or any(getattr(model, flag, False) for flag in flags)


def _cached(model: Any, ids: torch.Tensor, kind: str) -> tuple[torch.Tensor, Forward]:
    """The tokens that the decoder reads, and its forward pass with one cache."""
    given = inputs.arguments(model, ids) | {"use_cache": True}
    text = inputs.predicted_ids(model, ids)
    if not inputs.is_encoder_decoder(model):
        given[inputs.cache_keyword(model)] = _cache(model.config, kind, text.shape[1])
        name = "input_ids"
    else:
        from transformers import EncoderDecoderCache

        source = given.pop("input_ids")
        # The decoder's own config: it may have another number of layers than the encoder.
        config = model.get_decoder().config
        given[inputs.cache_keyword(model)] = EncoderDecoderCache(
            _cache(config, kind, text.shape[1]), _cache(config, kind, source.shape[1])
        )
        given["encoder_outputs"] = model.get_encoder()(input_ids=source)
        name = "decoder_input_ids"

    def forward(part: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(**given | {name: part}).logits
        return logits

    return text, forward


def _cache(config: Any, kind: str, length: int) -> Any:
    from transformers import DynamicCache, StaticCache

    config = config.get_text_config(decoder=True)
    if kind == "dynamic":
        return DynamicCache(config=config)
    return StaticCache(config=config, max_cache_len=length)
