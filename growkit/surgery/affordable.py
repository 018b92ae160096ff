"""Sizes that nobody can mean: refused before an index map of that size is made."""

from __future__ import annotations

from math import prod

from growkit.errors import UsageError
from growkit.surgery.amount import Amount
from growkit.surgery.growth import ModelShape, Operator

# A plan holds several numbers for each unit of an axis, and an object for each tensor of a layer.
MOST_UNITS, MOST_LAYERS, MOST_EXPERTS = 1 << 24, 1 << 16, 1 << 13
MOST_BYTES = 10**14
UNITS = {"hidden": "hidden channels", "ffn": "FFN units", "head_dim": "channels a head"}


def check_affordable(operator: Operator, shape: ModelShape) -> None:
    """Refuse a size whose weights would need more than 100 TB, or that cannot be planned.

    Raises:
        UsageError: with the bytes that the grown axis alone would need, at two a weight, or the
            number of experts.
    """
    amount, axis = getattr(operator, "amount", None), str(getattr(operator, "axis", ""))
    if not isinstance(amount, Amount) or (axis not in shape.sizes and axis != "expert"):
        return
    size = shape.sizes.get(axis, 1)  # a dense FFN counts as one expert
    target = amount.exact(size)
    if axis == "expert" and target > MOST_EXPERTS:
        raise UsageError(
            f"{amount.text} asks for {int(target):,} experts from {size:,}; growkit plans at most "
            f"{MOST_EXPERTS:,}, each of them three matrices a layer.",
            "Ask for fewer.",
        )
    layers = any(stack.axis == axis for stack in shape.family.stacks)
    needed = 2 * _weights(shape, axis) * target / size
    if needed <= MOST_BYTES and target <= (MOST_LAYERS if layers else MOST_UNITS):
        return
    raise UsageError(
        f"{amount.text} asks for {int(target):,} {UNITS.get(axis, axis.replace('_', ' ') + 's')} "
        f"from {size:,}: at least {float(needed) / 1e12:,.4g} TB of weights.",
        "Ask for a size that fits on a disk.",
    )


def _weights(shape: ModelShape, axis: str) -> int:
    """Weights of all tensors that the axis is a part of."""
    sizes, total = shape.sizes, 0
    for tensor in shape.family.tensors:
        if not tensor.when(sizes):
            continue
        inside = any(axis in dim.layout(sizes).axes for dim in tensor.dims)
        if inside or (tensor.per_layer and tensor.stack == axis) or axis == "head_dim":
            copies = sizes[tensor.stack] if tensor.per_layer else 1
            copies *= sizes["expert"] if "{expert}" in tensor.name else 1
            total += copies * prod(tensor.shape(sizes))
    return total
