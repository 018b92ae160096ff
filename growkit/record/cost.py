"""What a model costs: parameters, FLOPs per token, KV-cache bytes per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from growkit.checkpoint import DTYPES
from growkit.families import Family


@dataclass(frozen=True)
class Cost:
    """Figures of one model.

    Attributes:
        parameters: all stored parameters (a tied output projection counts once; of quantised
            weights the values that they stand for).
        non_embedding_parameters: without the embedding and an output projection of its own.
        active_parameters: without the experts that a token is not routed to.
        flops_per_token: forward pass, at ``context`` tokens of context: 2 per weight that a token
            meets (the output projection included, the embedding lookup not), plus scores and
            values of every attention map averaged over the context. Of an encoder-decoder: one
            source and one target token together, each in a text of ``context`` tokens.
        context: tokens of context assumed.
        kv_cache_bytes_per_token: the cache of ``context`` tokens in ``dtype``, all layers, over
            their number (a layer with a window keeps no more than that); of an encoder-decoder
            for one source and one target token.
        dtype: safetensors dtype of the KV cache (that of the weights).
    """

    parameters: int
    non_embedding_parameters: int
    active_parameters: int
    flops_per_token: int
    context: int
    kv_cache_bytes_per_token: int
    dtype: str

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def training_flops(forward: float, trained: float = 1.0, *, recomputed: bool = False) -> float:
    """FLOPs of a training step a token, from those of a forward pass.

    Forward once, once more for the gradients of activations and once for those of weights (Kaplan
    et al. 2020, arXiv:2001.08361, section 2.1): three passes where everything is trained.

    Args:
        trained: part of the weights that get gradients of their own.
        recomputed: activations are made a second time (gradient checkpointing).
    """
    return (2.0 + trained + recomputed) * forward


def cost_of(
    family: Family,
    sizes: Mapping[str, int],
    dtype: str,
    context: int,
    config: Mapping[str, Any] | None = None,
) -> Cost:
    """Count a model of ``sizes``. ``context`` is in tokens; ``config`` tells attention windows."""
    layered = outer = embeddings = head = idle = again = 0
    for tensor in family.tensors:
        if not tensor.when(sizes):
            continue
        count = prod(tensor.shape(sizes)) * tensor.values
        if tensor.per_layer:
            layers = range(sizes[tensor.stack])
            count *= sum(tensor.layers(sizes, layer) for layer in layers)
            if "{expert}" in tensor.name:
                count *= sizes["expert"]
            if tensor.of_experts:
                idle += count // sizes["expert"] * (sizes["expert"] - sizes["active_expert"])
            layered += count
            again += count * (tensor.uses(sizes) - 1)
        elif tensor.role in ("embed", "lm_head"):
            embeddings += count
        else:
            outer += count
        if tensor.role == "embed":
            head = count
    attended, caches = _attention(family, sizes, context, config or {})
    return Cost(
        parameters=layered + outer + embeddings,
        non_embedding_parameters=layered + outer,
        active_parameters=layered + outer + embeddings - idle,
        flops_per_token=2 * (layered + again - idle + outer + head)
        + int(family.attention_flops(sizes) * attended * context),
        context=context,
        kv_cache_bytes_per_token=int(family.kv_elements(sizes) * caches * DTYPES[dtype].bits // 8),
        dtype=dtype,
    )


def training_flops_of(
    family: Family,
    sizes: Mapping[str, int],
    context: int,
    config: Mapping[str, Any] | None = None,
) -> float:
    """FLOPs of a training step a token, in texts of ``context`` tokens, where all is trained."""
    return training_flops(cost_of(family, sizes, "F32", context, config).flops_per_token)


def _attention(
    family: Family, sizes: Mapping[str, int], context: int, config: Mapping[str, Any]
) -> tuple[float, float]:
    """(part of the context that is attended to, KV caches), each summed over the layers.

    A layer with a window of w < C tokens keeps w of C, and its tokens see min(t, w) before them.
    """
    attended = caches = 0.0
    for stack in family.stacks:
        layers = sizes[stack.axis]
        windows: list[int | None] = [None] * layers
        if stack.axis == "layer":
            windows = family.attention_windows(config, layers)
        parts = [min(1.0, window / context) if window else 1.0 for window in windows]
        caches += stack.caches * sum(parts)
        attended += stack.attended * sum(part * (2.0 - part) for part in parts)
    return attended, caches
