"""Checks that several operators make."""

from __future__ import annotations

from growkit.core.errors import UsageError
from growkit.families.upcycling import UPCYCLINGS
from growkit.surgery.effect import ModelShape

WHAT_GROWS = {
    "query_head": "--query-heads, --heads",
    "signal_head": "--signal-heads, --noise-heads, --uniform-heads",
    "kv_head": "--kv-heads",
    "layer": "--layers",
    "decoder_layer": "--decoder-layers",
    "ffn": "--ffn",
    "hidden": "--hidden",
    "expert": "--experts",
}


def growable(shape: ModelShape) -> str:
    """The options that this checkpoint can be grown by, as text."""
    axes = {*shape.sizes, *(("expert",) if shape.family.name in UPCYCLINGS else ())}
    options = ", ".join(options for axis, options in WHAT_GROWS.items() if axis in axes).split(", ")
    if "query_head" in shape.sizes and not _shares_heads(shape):
        options = [option for option in options if option not in ("--query-heads", "--kv-heads")]
    if not shape.family.head_dim.refusal:
        options.append("--head-dim")
    if shape.sizes["tied"]:
        options.append("--untie-embeddings")
    return ", ".join(option for option in options if option not in shape.family.refused)


def _shares_heads(shape: ModelShape) -> bool:
    """The family can hold more query than key/value heads."""
    sizes = {**shape.sizes, "query_head": 2 * shape.sizes["query_head"]}
    wider = {**sizes, "hidden": 2 * sizes["hidden"]}
    return any(shape.family.refusal(shape.config, tried) is None for tried in (sizes, wider))


def require_axis(shape: ModelShape, axis: str, option: str) -> None:
    """Raise UsageError when the family has no such axis, or refuses the operator by name."""
    if reason := shape.family.refused.get(option):
        raise UsageError(
            f"{option} cannot grow a {shape.family.name} checkpoint: {reason}.",
            f"It can be grown by: {growable(shape)}.",
        )
    if axis not in shape.sizes:
        raise UsageError(
            f"A {shape.family.name} checkpoint has no {axis.replace('_', ' ')}s, so {option} "
            "cannot grow it.",
            f"It can be grown by: {growable(shape)}.",
        )
