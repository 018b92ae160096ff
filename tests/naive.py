"""A plan carried out in memory, entry by entry: what the streaming writer must equal bit for bit.

For even shares, which are arithmetic; the random ones are checked by their sums (``shrink.py``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_checkpoints import NUMPY, Array, Tensors

from growkit.surgery.axis_map import NEW
from growkit.surgery.dim_map import DimMap
from growkit.surgery.effect import Fill
from growkit.surgery.plan import Plan
from growkit.surgery.symmetry import compute_dtype
from growkit.surgery.tensor_plans import TensorPlan

Mask = npt.NDArray[np.bool_]


def disagreements(plan: Plan, old: Tensors, grown: Tensors) -> list[str]:
    """Names of written tensors that are not what the plan says, of which the entries are fixed.

    Random entries (new units that nobody reads, tensors without a source) are not looked at, nor
    are means, scaled keys and lambda vectors that move: they have tests of their own.
    """
    assert plan.symmetry.mode == "even"
    wrong = []
    for tensor in plan.tensors:
        written = grown[tensor.output.name]
        for part in tensor.matrices():
            if part.source is None or part.lambda_change is not None:
                continue
            source, found = old[part.source], written
            if part.piece is not None:
                here = part.source_start // max(source[0].nbytes, 1)
                source, found = source[here], written[part.piece]
            expected, fixed = _carried_out(part, source)
            same = expected.dtype == found.dtype and expected.shape == found.shape
            bits = f"u{found.dtype.itemsize}"
            if not same or (expected.view(bits) != found.view(bits))[fixed].any():
                wrong.append(part.key)
    return wrong


def _carried_out(tensor: TensorPlan, source: Array) -> tuple[Array, Mask]:
    kind = NUMPY[tensor.output.dtype]
    shape = tensor.output.shape
    if tensor.action in ("zero", "closed"):
        value = 0.0 if tensor.action == "zero" else -tensor.gain_offset
        return np.full(shape, value).astype(kind), np.ones(shape, bool)
    values = source if tensor.share is None else _even(source, tensor.share.copies)
    fixed: Any = np.ones(source.shape, bool)
    for axis, dim in enumerate(tensor.dims):
        if dim is not None:
            values, fixed = _moved(values, fixed, axis, dim)
    if tensor.factor != 1.0:
        wide = np.dtype(np.float64) if tensor.gain_offset else compute_dtype(values.dtype)
        offset, factor = wide.type(tensor.gain_offset), wide.type(tensor.factor)
        values = (values.astype(wide) + offset) * factor - offset
    return values.astype(kind), fixed


def _moved(values: Array, fixed: Mask, axis: int, dim: DimMap) -> tuple[Array, Mask]:
    """The array with one dimension grown, and which of its entries the plan fixes."""
    zero = dim.new(Fill.ZERO)
    columns, is_fixed = [], []
    for unit, origin in enumerate(dim.source.tolist()):
        for element in range(dim.block):
            if origin == NEW:
                column = np.zeros_like(np.take(values, 0, axis))
                known = np.full(column.shape, zero[unit * dim.block + element])
            else:
                column = np.take(values, origin * dim.block + element, axis)
                known = np.take(fixed, origin * dim.block + element, axis)
                if dim.consumes:
                    column = _even(column, int((dim.source == origin).sum()))
                if dim.scale is not None:
                    known = np.zeros_like(known)
            columns.append(column)
            is_fixed.append(known)
    return np.stack(columns, axis), np.stack(is_fixed, axis)


def _even(weights: Array, copies: int) -> Array:
    if copies == 1:
        return weights
    wide = weights.astype(compute_dtype(weights.dtype))
    return (wide / wide.dtype.type(copies)).astype(weights.dtype)
