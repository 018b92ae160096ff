"""What families with LayerNorm and one key/value head a query head share (GPT-2, NeoX, OPT)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from growkit.families.base import Config, Family, Tensor
from growkit.families.decoder import decoder, hidden_normed
from growkit.families.unit_layout import Sizes


def layer_norm(role: str, name: str) -> tuple[Tensor, Tensor]:
    """Gain and bias [hidden] of a LayerNorm; ``name`` is the module's."""
    return (
        Tensor(role, f"{name}.weight", (hidden_normed,), init="ones"),
        Tensor(f"{role}_bias", f"{name}.bias", (hidden_normed,), init="zeros"),
    )


def whole_heads(class_name: str, hidden: str) -> Callable[[Config, Sizes], str | None]:
    """Objection of classes that derive head_dim from the hidden size and know no shared heads.

    ``hidden`` is the config field of the hidden size.
    """

    def refusal(config: Config, sizes: Sizes) -> str | None:
        heads, width, dim = sizes["query_head"], sizes["hidden"], sizes["head_dim"]
        if heads != sizes["kv_head"]:
            return (
                f"{class_name} has one key/value head for each query head, not "
                f"{sizes['kv_head']} for {heads}; --heads grows both"
            )
        if heads * dim != width:
            return (
                f"{class_name} wants {hidden} to be heads x head_dim, and {heads} heads of {dim} "
                f"make {heads * dim}, not {width}"
            )
        return None

    return refusal


def layer_norm_decoder(
    name: str,
    tensors: tuple[Tensor, ...],
    sizes: Callable[[Config], dict[str, int]],
    **facts: Any,
) -> Family:
    """A family of decoders with LayerNorm and multi-head attention."""
    return decoder(name, tensors, sizes, per_layer_fields=(), **facts)


def head_sizes(hidden: int, heads: int) -> dict[str, int]:
    """Sizes of heads that fill the hidden size."""
    dim = hidden // heads
    return {"query_head": heads, "kv_head": heads, "head_dim": dim, "value_dim": dim}
