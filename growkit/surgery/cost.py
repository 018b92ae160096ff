"""What a model costs: parameters, FLOPs per token, KV-cache bytes per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod

from growkit.checkpoint import DTYPES
from growkit.families import Family


@dataclass(frozen=True)
class Cost:
    """Figures of one model.

    Attributes:
        parameters: all stored parameters (a tied output projection counts once).
        non_embedding_parameters: without the embedding and an output projection of its own.
        flops_per_token: forward pass, at ``context`` tokens of context: 2 per weight that a token
            meets (the output projection included, the embedding lookup not), plus scores and
            values of every attention map averaged over a causal context.
        context: tokens of context assumed.
        kv_cache_bytes_per_token: all layers, in ``dtype``.
        dtype: safetensors dtype of the KV cache (that of the weights).
    """

    parameters: int
    non_embedding_parameters: int
    flops_per_token: int
    context: int
    kv_cache_bytes_per_token: int
    dtype: str

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def cost_of(family: Family, sizes: Mapping[str, int], dtype: str, context: int) -> Cost:
    """Count a model of ``sizes``. ``context`` is in tokens."""
    per_layer = outer = embeddings = head = 0
    for tensor in family.tensors:
        if not tensor.when(sizes):
            continue
        count = prod(tensor.shape(sizes))
        if tensor.per_layer:
            per_layer += count
        elif tensor.role in ("embed", "lm_head"):
            embeddings += count
        else:
            outer += count
        if tensor.role == "embed":
            head = count
    total_layers = per_layer * sizes["layer"]
    attention = family.attention_flops(sizes) * sizes["layer"] * context // 2
    return Cost(
        parameters=total_layers + outer + embeddings,
        non_embedding_parameters=total_layers + outer,
        flops_per_token=2 * (total_layers + outer + head) + attention,
        context=context,
        kv_cache_bytes_per_token=family.kv_elements(sizes)
        * sizes["layer"]
        * DTYPES[dtype].bits
        // 8,
        dtype=dtype,
    )
