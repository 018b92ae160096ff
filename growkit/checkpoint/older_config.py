"""config.json of older releases, in the words that its class has today.

transformers reads these forms and writes others; growkit changes fields, and has to find
them under the names that count. What is not listed here stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Config = dict[str, Any]
# Of the whole of a Qwen2-VL; every other field of its flat form speaks of the language model.
_WHOLE = frozenset([
    "architectures", "auto_map", "dtype", "image_token_id", "model_type", "quantization_config",
    "text_config", "tie_word_embeddings", "torch_dtype", "transformers_version", "video_token_id",
    "vision_config", "vision_end_token_id", "vision_start_token_id", "vision_token_id",
])  # fmt: skip
# Words that every transformers since 5.16 takes; newer ones write the first two otherwise.
_HYBRID = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}


def current_form(config: Config) -> Config:
    """The same config in today's words; itself where it has them already."""
    known = _FORMS.get(str(config.get("model_type")))
    return known(config) if known is not None else config


def _bloom(config: Config) -> Config:
    """``n_embed`` is the hidden size (bigscience/bloom-560m)."""
    width = config.get("n_embed")
    if not isinstance(width, int):
        return config
    return {
        "hidden_size" if key == "n_embed" else key: value
        for key, value in config.items()
        if key != "hidden_size"
    }


def _nemotron_h(config: Config) -> Config:
    """``hybrid_override_pattern`` is a letter a layer (nvidia/Nemotron-H-8B-Base-8K)."""
    pattern = config.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or not set(pattern) <= _HYBRID.keys():
        return config
    result = {key: value for key, value in config.items() if key != "hybrid_override_pattern"}
    if not isinstance(result.get("layers_block_type"), list):
        result["layers_block_type"] = [_HYBRID[letter] for letter in pattern]
    return result


def _flat_text(config: Config) -> Config:
    """The language model's fields stand beside the others (Qwen/Qwen2.5-VL-7B-Instruct)."""
    if "text_config" in config or "vision_config" not in config:
        return config
    both = ("tie_word_embeddings",)
    text = {key: value for key, value in config.items() if key not in _WHOLE or key in both}
    whole = {key: value for key, value in config.items() if key in _WHOLE}
    return whole | {"text_config": {"model_type": f"{config['model_type']}_text", **text}}


_FORMS: dict[str, Callable[[Config], Config]] = {
    "bloom": _bloom,
    "nemotron_h": _nemotron_h,
    "qwen2_vl": _flat_text,
    "qwen2_5_vl": _flat_text,
}
