"""What a model is run on: a window of tokens, which an encoder-decoder reads in two halves."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def is_encoder_decoder(model: Any) -> bool:
    """The model reads a source text and writes a target text."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def cache_keyword(model: Any) -> str:
    """Under which name the model takes and returns its cache.

    ``cache`` from transformers 5.24 on; ``past_key_values`` before, and in model code of that time.
    """
    parameters = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def depth(model: Any) -> int:
    """Layers that a token's signal passes: those of all stacks."""
    config = model.config
    if not is_encoder_decoder(model):
        return int(config.get_text_config(decoder=True).num_hidden_layers)
    return int(config.num_hidden_layers) + int(config.num_decoder_layers)


def arguments(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Arguments of one forward pass over token ids ``[batch, length]``, without a cache.

    An encoder reads the first half; its decoder is given the start token and the second half, as
    in training (teacher forcing).
    """
    if not is_encoder_decoder(model):
        return {"input_ids": ids, "use_cache": False}
    source, target = ids.split([ids.shape[1] // 2, ids.shape[1] - ids.shape[1] // 2], dim=1)
    start = torch.full_like(target[:, :1], start_token(model))
    decoder_ids = torch.cat([start, target], dim=1)
    return {"input_ids": source, "decoder_input_ids": decoder_ids, "use_cache": False}


def predicted_ids(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The token ids ``[batch, length]`` at the positions that have logits."""
    given = arguments(model, ids)
    result: torch.Tensor = given.get("decoder_input_ids", given["input_ids"])
    return result


def start_token(model: Any) -> int:
    """The id that a decoder begins with."""
    config = model.config
    for name in ("decoder_start_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value >= 0:
            return value
    return 0
