"""What a model is run on: a window of tokens, which an encoder-decoder reads in two halves.

A model that reads pixels, sound or features of it is given noise instead, the same for the same
window. What is compared is its logits, or without a head its last hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

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


def takes_cache(model: Any) -> bool:
    """Whether the model's forward pass names a cache among what it takes."""
    return cache_keyword(model) in inspect.signature(type(model).forward).parameters


def own_cache_keyword(model: Any) -> str | None:
    """The same of a class whose cache is of its own kind (xLSTM, MiniMax, RWKV): it makes the first
    one itself. None where the class takes transformers' own."""
    if getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        return None
    parameters = inspect.signature(type(model).forward).parameters
    names = ("cache", "past_key_values", "cache_params", "state")
    return next((name for name in names if name in parameters), None)


def can_generate(model: Any) -> bool:
    """The model predicts the next token (a decoder); else it is an encoder, or it drafts tokens
    from what another model computes, and keeps no cache of its own."""
    if reads_target(model):
        return False
    asked = getattr(model, "can_generate", None)
    return asked is None or bool(asked()) or is_encoder_decoder(model)


def main_input(model: Any) -> str:
    """Name of what the model reads: ``input_ids``, or pixels or features of its own."""
    name = getattr(model, "main_input_name", "input_ids")
    return "input_ids" if "input_ids" in _parameters(model) else str(name)


def reads_target(model: Any) -> bool:
    """The model drafts tokens for another one, whose hidden states, keys and values it reads."""
    of_target = getattr(getattr(model, "config", None), "backbone_hidden_size", None)
    return isinstance(of_target, int) and "shared_kv_states" in _parameters(model)


def reads_tokens(model: Any) -> bool:
    """The model reads token ids; else pixels, sound or features of it."""
    return main_input(model) == "input_ids"


def has_vocabulary(model: Any) -> bool:
    """The model reads tokens, or its decoder does."""
    return reads_tokens(model) or is_encoder_decoder(model)


def _parameters(model: Any) -> Any:
    forward = model.forward if hasattr(model, "forward") else model.model.forward  # layer by layer
    return inspect.signature(forward).parameters


def text_config(model: Any) -> Any:
    """The part of the config that speaks of the layers."""
    return model.config.get_text_config(decoder=True)


def stack_depths(model: Any) -> dict[str, int]:
    """Layers of each stack: of the only one under "", else of ``encoder`` and ``decoder``."""
    config = model.config
    if not is_encoder_decoder(model):
        return {"": first_number(text_config(model), *LAYER_FIELDS)}
    parts: dict[str, Any] = {n: getattr(config, n, None) for n in ("encoder", "decoder")}
    if all(hasattr(part, "num_hidden_layers") for part in parts.values()):
        return {name: int(part.num_hidden_layers) for name, part in parts.items()}
    encoder = first_number(config, "encoder_layers", *LAYER_FIELDS)
    decoder = first_number(config, "num_decoder_layers", "decoder_layers", *LAYER_FIELDS)
    return {"encoder": encoder, "decoder": decoder}


LAYER_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")


def first_number(config: Any, *names: str) -> int:
    """The first of these fields that is a number; 0 where none is."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0


def largest_number(config: Any, name: str, default: int = 0) -> int:
    """A number of a config, the largest where it says one for each layer."""
    try:
        value = getattr(config, name, None)
    except Exception:  # transformers wants to be asked about each layer (Gemma 4)
        value = vars(config).get(name)
    value = max(value, default=0) if isinstance(value, list) else value
    return int(value) if value else default


def depth(model: Any) -> int:
    """Layers that a token's signal passes: those of all stacks."""
    return sum(stack_depths(model).values())


def arguments(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Arguments of one forward pass over token ids ``[batch, length]``, without a cache.

    An encoder reads the first half; its decoder is given the start token and the second half, as
    in training (teacher forcing). A model that reads pixels or sound is given noise that the ids
    decide about.
    """
    cache = {"use_cache": False} if can_generate(model) or "use_cache" in _parameters(model) else {}
    if (beside := beside_tokens.get(model)) is not None:
        return {**beside(model, ids), **cache}
    if not is_encoder_decoder(model):
        return {**source_arguments(model, ids), **cache}
    source, target = ids.split([ids.shape[1] // 2, ids.shape[1] - ids.shape[1] // 2], dim=1)
    start = torch.full_like(target[:, :1], start_token(model))
    decoder_ids = torch.cat([start, target], dim=1)
    return {**source_arguments(model, source), "decoder_input_ids": decoder_ids, **cache}


# Multimodal models that are given something for their towers too (:mod:`sight`) -> what makes it.
beside_tokens: WeakKeyDictionary[Any, Callable[[Any, torch.Tensor], dict[str, Any]]] = (
    WeakKeyDictionary()
)


def source_arguments(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """What the first stack reads for token ids ``[batch, length]``."""
    if reads_target(model):
        return _of_target(model, ids)
    if reads_tokens(model):
        return {"input_ids": ids}
    shapes = _shapes.get(model)
    if shapes is None:
        shapes = _shapes[model] = _accepted_shapes(model, ids[:1])
    return _noise(model, ids, shapes)


def tower_of(model: Any, field: str) -> Any:
    """The outermost module of a multimodal model with a config of the kind that ``field`` holds;
    None where there is none that takes inputs of its own."""
    kind = type(getattr(model.config, field, None))
    for module in model.modules():
        if type(getattr(module, "config", None)) is kind and hasattr(module, "main_input_name"):
            return module
    return None


def features(model: Any, tower: Any, ids: torch.Tensor) -> torch.Tensor:
    """What a multimodal model makes of noise for its language model, of the hidden states that it
    looks at; where it has no such function for pixels alone, what its tower makes of it."""
    given = arguments(tower, ids)
    seen = getattr(model, "get_image_features", None)
    if seen is not None and "pixel_values" in given:
        try:
            found = seen(pixel_values=given["pixel_values"])
        except Exception:  # it wants sizes or grids too
            return output_of(tower(**given))
        found = getattr(found, "pooler_output", found)
        if isinstance(found, list | tuple):
            found = torch.cat([part.reshape(-1, part.shape[-1]) for part in found])
        if isinstance(found, torch.Tensor):
            return found
    return output_of(tower(**given))


def outputs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[batch, length, vocab]`` of a forward pass without a cache; of a model without a
    head its last hidden states."""
    return output_of(model(**arguments(model, ids)))


def output_of(result: Any) -> torch.Tensor:
    """Logits of a forward pass, or the last hidden states of a model that has no head."""
    for name in ("logits", "prediction_logits", "reconstruction", "last_hidden_state"):
        value = getattr(result, name, None)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    values = result.to_tuple() if hasattr(result, "to_tuple") else tuple(result)
    tensors = [
        v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim()
    ]
    return tensors[0]


def described(model: Any) -> str:
    """What an encoder gives, in words."""
    names = set(vars(type(model)).get("__annotations__", {})) | set(dir(model))
    head = bool(names & {"lm_head", "classifier", "decoder", "cls", "generator_lm_head"})
    masked = "MaskedLM" in type(model).__name__ or "PreTraining" in type(model).__name__
    return "masked-token logits" if masked else "logits of its head" if head else "hidden states"


# -- pixels, sound and features of it --------------------------------------------------------------

BYTES = 256  # values of the numbers that noise is made of
Shapes = dict[str, tuple[int, ...]]
_shapes: WeakKeyDictionary[Any, Shapes] = WeakKeyDictionary()


def _of_target(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Noise for the embeddings and hidden states of the model that is drafted for, side by side,
    and for the keys and values of its last layer of each kind."""
    weight, length = next(model.parameters()), ids.shape[1]
    heads = largest_number(text_config(model), "num_attention_heads", 1)
    shared: dict[str, Any] = {}
    for module in model.modules():
        kind, groups = (getattr(module, n, None) for n in ("layer_type", "num_key_value_groups"))
        if kind is not None and groups and kind not in shared:
            shape = (2, heads // groups, length, module.head_dim)
            made = torch.stack([noise(row, shape, weight) for row in ids], dim=1)
            shared[kind] = made[0], made[1]
    both = (length, 2 * model.config.backbone_hidden_size)
    states = torch.stack([noise(row, both, weight) for row in ids])
    # Asked for hidden states, Gemma 4's class keeps all positions (5.24 fails in leaving some out).
    kept = {"output_hidden_states": True}
    return {"inputs_embeds": states, "shared_kv_states": shared, **kept}


def _noise(model: Any, ids: torch.Tensor, shapes: Shapes) -> dict[str, Any]:
    """Normal numbers of these shapes, a row for each row of ids; masks are ones."""
    weight = next(model.parameters())
    made: dict[str, Any] = {}
    for name, shape in shapes.items():
        if "mask" in name:
            made[name] = torch.ones((len(ids), *shape), dtype=torch.long)
        elif name == "spatial_shapes":
            made[name] = torch.tensor([list(shape)] * len(ids))
        else:
            made[name] = torch.stack([noise(row, shape, weight) for row in ids])
    return made


def noise(row: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Normal numbers of this shape that a row of ids decides about."""
    places = torch.arange(1, len(row) + 1)
    seed = int((row.long() * places).sum()) % (1 << 31)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def _accepted_shapes(model: Any, ids: torch.Tensor) -> Shapes:
    """The shapes of the first input that the class computes with; the last one where none does,
    so that its own error is told."""
    tried: Shapes = {}
    for tried in _candidates(model):
        given = _noise(model, ids, tried)
        if is_encoder_decoder(model):
            given["decoder_input_ids"] = torch.full_like(ids[:, :1], start_token(model))
        try:
            with torch.no_grad():
                if torch.isfinite(output_of(model(**given))).all():
                    return tried
        except Exception:  # another shape
            continue
    return tried


def _candidates(model: Any) -> Iterator[Shapes]:
    """Shapes that models of such configs read, without the batch."""
    config, name = model.config, main_input(model)
    inner = getattr(config, "vision_config", None) or config
    patch = pair_of(getattr(inner, "patch_size", None)) or (16, 16)
    channels = first_number(inner, "num_channels", "in_channels", "in_chans") or 3
    image = pair_of(getattr(inner, "image_size", None)) or (2 * patch[0], 2 * patch[1])
    if name == "pixel_values":
        yield {name: (channels, *image)}
        yield {name: (channels, 4 * patch[0], 4 * patch[1])}
        flat = channels * patch[0] * patch[1]
        yield {name: (4, flat), "pixel_attention_mask": (4,), "spatial_shapes": (2, 2)}
        frames = first_number(inner, "num_frames") or 2
        yield {name: (frames, channels, *image)}
    bins = first_number(config, "num_mel_bins", "input_feat_per_channel")
    long = first_number(config, "max_source_positions")
    inside = first_number(config, "feature_projection_input_dim", "input_dim") or bins
    if name == "input_features":
        yield {name: (bins, 2 * long)}
        yield {name: (min(64, long or 64), bins)}
        yield {name: (32, inside)}
        yield {name: (1, first_number(config, "spec_size") or 64, bins)}
    yield {name: (first_number(config, "max_length") or 64, bins or 128)}
    yield {name: (4000,)}
    yield {name: (1, 4000)}


def pair_of(size: Any) -> tuple[int, int] | None:
    """Height and width, of a number or of two."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def predicted_ids(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The token ids ``[batch, length]`` at the positions that have logits."""
    result: torch.Tensor = arguments(model, ids).get("decoder_input_ids", ids)
    return result


def start_token(model: Any) -> int:
    """The id that a decoder begins with."""
    config = model.config
    for name in ("decoder_start_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value >= 0:
            return value
    return 0
