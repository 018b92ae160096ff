"""SAS: depth, FFN and hidden width grow; heads do not.

Every simulated head reads every trained head, and o_proj reads chunks of as many simulated heads as
there are trained ones, so no head is a unit of its own.
"""

from __future__ import annotations

from typing import Any

from growkit.families.base import Config, Tensor, consumes, produces, required
from growkit.families.decoder import ATTENTION, attention_tensors, flag, head_norm_tensors
from growkit.families.unit_layout import Sizes, fixed
from growkit.variants.shared.decoder_family import common_fields, common_sizes, variant


def _sizes(config: Config) -> dict[str, int]:
    return common_sizes(config) | {
        "trained_heads": required(config, "num_attention_heads"),
        "trained_kv_heads": required(config, "num_key_value_heads"),
        "simulated_heads": required(config, "num_simulated_heads"),
        "simulated_head_dim": required(config, "simulated_head_dim"),
        "kernel": required(config, "sas_kernel_size"),
    }


def _fields(sizes: Sizes) -> dict[str, Any]:
    return common_fields(sizes, sizes["trained_heads"], sizes["trained_kv_heads"])


def _width(*names: str) -> Any:
    """A dimension that no operator grows: the product of these sizes."""

    def width(sizes: Sizes) -> int:
        product = 1
        for name in names:
            product *= sizes[name]
        return product

    return fixed(width)


def _channels(sizes: Sizes) -> int:
    """A convolution over heads is applied at every channel of a head."""
    return sizes["head_dim"]


def _simulated_heads(sizes: Sizes) -> int:
    """A map of features is applied to every simulated head."""
    return sizes["simulated_heads"]


def _simulation(kind: str, heads: str, features: bool) -> tuple[Tensor, ...]:
    """Weights and biases of one simulation."""
    layers: dict[str, tuple[str, ...]] = {
        "heads": ("simulated_heads", heads, "kernel"),
        "heads_residual": ("simulated_heads", "simulated_heads", "kernel"),
    }
    if features:
        layers["features"] = ("simulated_head_dim", "head_dim")
        layers["features_residual"] = ("simulated_head_dim", "simulated_head_dim")
    name = f"{ATTENTION}simulate_{kind}"
    return tuple(
        Tensor(
            f"simulate_{kind}.{layer}.{part}",
            f"{name}.{layer}.{part}",
            tuple(produces(_width(size)) for size in (sizes if part == "weight" else sizes[:1])),
            uses=_channels if layer.startswith("heads") else _simulated_heads,
            own_start=True,
        )
        for layer, sizes in layers.items()
        for part in ("weight", "bias")
    )


_ALL_HEADS = "every simulated head reads every trained head, so no head is a unit of its own"
_trained = _width("trained_heads", "head_dim")
_trained_kv = produces(_width("trained_kv_heads", "head_dim"))
SAS = variant(
    "sas",
    (
        *attention_tensors(produces(_trained), _trained_kv, _trained_kv, consumes(_trained)),
        *head_norm_tensors(when=flag("qk_norm")),
        *_simulation("q", "trained_heads", features=True),
        *_simulation("k", "trained_kv_heads", features=True),
        *_simulation("v", "trained_kv_heads", features=False),
    ),
    _sizes,
    _fields,
    kv_elements=lambda s: s["simulated_heads"] * (s["simulated_head_dim"] + s["head_dim"]),
    attention_flops=lambda s: 2 * s["simulated_heads"] * (s["simulated_head_dim"] + s["head_dim"]),
    refused=dict.fromkeys(("--heads", "--query-heads", "--kv-heads"), _ALL_HEADS),
)
