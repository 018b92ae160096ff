"""One window that is longer than everything that a config says about lengths."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from growkit.verification import inputs
from growkit.verification.cost import affordable, window_bytes, window_flops
from growkit.verification.pair import Pair
from growkit.verification.reach import Boundary, boundaries, is_dynamic, longest_boundary

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
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def keeps_logits(model: Any) -> bool:
    """``forward`` can compute the logits of the last positions alone."""
    forward = model.forward if hasattr(model, "forward") else model.model.forward  # layer by layer
    return "logits_to_keep" in inspect.signature(forward).parameters


def tail_logits(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Logits ``[batch, count, vocab]`` of the last ``count`` positions, without a cache."""
    further = {"logits_to_keep": count} if keeps_logits(model) else {}
    logits: torch.Tensor = model(**inputs.arguments(model, ids), **further).logits
    return logits[:, -count:]
