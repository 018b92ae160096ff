"""How far a model looks: the longest length at which its config makes it compute something else.

Sliding windows, attention chunks and the lengths at which a rotary scaling sets in are invisible in
text that is shorter than they are: a window that growth lost shows only behind it.

One window that is longer than everything that a config says about lengths.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from growkit.verification import model_inputs as inputs
from growkit.verification.affordable import affordable, window_bytes, window_flops
from growkit.verification.pair import Pair

# Config fields, at any depth, that hold a length from which on a layer attends otherwise.
LENGTH_FIELDS = (
    "sliding_window",
    "attention_chunk_size",
    "attention_window",
    "attention_window_size",
    "window_size",
    "local_attention",
    "chunk_size",
    "local_size",
    "relative_attention_max_distance",
)
# Kinds of layers that read such a length; a config that lists other kinds alone reads none.
LOCAL_LAYERS = ("sliding", "chunked", "local")
UNSCALED = ("default", "linear", "proportional")  # the same at every length


@dataclass(frozen=True)
class Boundary:
    """A length (in tokens) from which on a model computes otherwise, and the field that says so."""

    length: int
    field: str


def longest_boundary(*configs: Mapping[str, Any]) -> Boundary | None:
    """The longest boundary of configs as nested dicts; None when all look everywhere alike."""
    found = [boundary for config in configs for boundary in boundaries(config)]
    return max(found, key=lambda boundary: boundary.length, default=None)


def boundaries(config: Mapping[str, Any]) -> Iterator[Boundary]:
    """All boundaries of a config, nested ones included."""
    yield from _lengths(config, "")
    yield from _scalings(config, config, "")


def is_dynamic(config: Mapping[str, Any]) -> bool:
    """The rotary frequencies depend on the length of the text (dynamic NTK): keys in a cache keep
    the frequencies of an earlier length, by design."""
    parts = (value for value in config.values() if isinstance(value, Mapping))
    return _rope_type(config) == "dynamic" or any(map(is_dynamic, parts))


def _rope_type(part: Mapping[str, Any]) -> str:
    return str(part.get("rope_type") or part.get("type") or "")


def _lengths(part: Mapping[str, Any], path: str) -> Iterator[Boundary]:
    types = part.get("layer_types")
    local = not isinstance(types, list | tuple) or any(
        str(kind).startswith(LOCAL_LAYERS) for kind in types
    )
    for name, value in part.items():
        if isinstance(value, Mapping):
            yield from _lengths(value, f"{path}{name}.")
        elif name in LENGTH_FIELDS and (local or name == "relative_attention_max_distance"):
            values = value if isinstance(value, list | tuple) else [value]
            numbers = [n for n in values if type(n) is int and n > 0]
            if numbers:
                yield Boundary(max(numbers), path + name)


def _scalings(part: Mapping[str, Any], parent: Mapping[str, Any], path: str) -> Iterator[Boundary]:
    """Rotary scalings: ``parent`` is the config that a scaling's own dict lies in."""
    kind = _rope_type(part) if "rope" in path else ""
    if kind and kind not in UNSCALED:
        for holder, prefix in ((part, path), (parent, "")):
            length = holder.get("original_max_position_embeddings")
            if type(length) is int and length > 0:
                yield Boundary(length, f"{prefix}original_max_position_embeddings")
                break
        else:
            length = parent.get("max_position_embeddings")
            if type(length) is int and length > 0:
                yield Boundary(length, "max_position_embeddings")
    holder = part if "max_position_embeddings" in part else parent
    for name, value in part.items():
        if isinstance(value, Mapping):
            yield from _scalings(value, holder, f"{path}{name}.")


TAIL = 128  # last positions of the window whose logits are compared
BEYOND = 16  # tokens behind a boundary without which a window does not count as longer


@dataclass(frozen=True)
class Reach:
    """How long the one long window has to be, and how long it is.

    Attributes:
        boundary: the longest length at which one of the models computes otherwise.
        tokens: of the long window; 0 where the ordinary windows suffice or it is not affordable.
        verified: tokens that a token of the longest window can look back on.
        with_cache: the long window is also affordable token by token, with caches.
        note: for the report.
    """

    boundary: Boundary | None
    tokens: int
    verified: int
    with_cache: bool = False
    note: str = ""

    @property
    def whole(self) -> bool:
        """No length is left at which the models might compute otherwise than verified."""
        return self.boundary is None or self.verified >= self.boundary.length + BEYOND


def plan_reach(pair: Pair, window: int, asked: int | None) -> Reach:
    """Choose the long window.

    Args:
        window: tokens of the ordinary windows.
        asked: length that the user chose; 0 for none, None for what is needed and affordable.
    """
    models = (pair.model_a, pair.model_b)
    if not inputs.reads_tokens(models[0]):
        return Reach(None, 0, window)  # what they read has one length
    configs = [model.config.to_dict() for model in models]
    halves = 2 if inputs.is_encoder_decoder(models[0]) else 1  # of a window, each read by one stack
    limits = [limit for model in models if (limit := position_limit(model)) is not None]
    boundary = longest_boundary(*configs)
    if boundary is not None and limits and boundary.length >= min(limits):
        # No text that the models are made for reaches it; shorter ones may still count.
        reached = [b for c in configs for b in boundaries(c) if b.length < min(limits)]
        boundary = max(reached, key=lambda found: found.length, default=None)
    verified = window // halves
    if asked is None and (boundary is None or verified >= boundary.length + BEYOND):
        return Reach(boundary, 0, verified)
    if asked == 0:
        return Reach(boundary, 0, verified, note=_unverified(boundary, verified, "none was wanted"))
    wanted = asked if asked is not None else halves * ((boundary.length if boundary else 0) + TAIL)
    length = min([wanted, *(halves * limit for limit in limits)])
    if length <= window:
        return Reach(boundary, 0, verified)
    logits = min(TAIL, length) if all(map(keeps_logits, models)) else length
    size = max(window_bytes(m, length, logits, pair.compute.itemsize) for m in models)
    passes = [
        window_flops(model, folder, length)
        for model, folder in zip(models, (pair.a, pair.b), strict=True)
    ]
    if asked is None and not affordable(sum(passes), size):
        why = f"one of {length:,} would take {sum(passes):.1e} operations and {size / 1e9:.1f} GB"
        return Reach(boundary, 0, verified, note=_unverified(boundary, verified, why))
    # B without a cache, with a dynamic and with a static one; A as well where B is wrong.
    with_cache = not pair.layerwise and affordable(3 * sum(passes), size)
    return Reach(boundary, length, length // halves, with_cache)


def _unverified(boundary: Boundary | None, verified: int, why: str) -> str:
    if boundary is None:
        return ""
    return (
        f"no window is longer than {boundary.field} = {boundary.length:,}: {why}; logits are "
        f"verified up to {verified:,} tokens, configs are compared field by field"
    )


def position_limit(model: Any) -> int | None:
    """Tokens that the model is made for, by its config; None without a limit.

    Learned positions end there. A dynamic rotary scaling begins there, and so is no limit.
    """
    config = model.config
    if is_dynamic(config.to_dict()):
        return None
    names = ("max_position_embeddings", "max_encoder_position_embeddings", "max_target_positions")
    limit = inputs.first_number(config.get_text_config(decoder=True), *names)
    if limit <= 0:
        return None
    # Positions of RoBERTa and its kin begin behind the padding id, which is 1.
    offset = 0 if inputs.can_generate(model) else getattr(config, "pad_token_id", None) or 0
    started = int(inputs.is_encoder_decoder(model))  # by a token before the text
    return limit - started - (offset + 1 if 0 < offset < 8 else 0)


def keeps_logits(model: Any) -> bool:
    """``forward`` can compute the logits of the last positions alone."""
    forward = model.forward if hasattr(model, "forward") else model.model.forward  # layer by layer
    return "logits_to_keep" in inspect.signature(forward).parameters


def tail_logits(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Logits ``[batch, count, vocab]`` of the last ``count`` positions, without a cache."""
    further = {"logits_to_keep": count} if keeps_logits(model) else {}
    return inputs.output_of(model(**inputs.arguments(model, ids), **further))[:, -count:]
