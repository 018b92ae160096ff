"""Weights without a source: random normal numbers, ones, or what closes a gain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import DTYPES
from growkit.surgery.plan import Plan, TensorPlan
from growkit.surgery.symmetry import random_bits

Array = npt.NDArray[Any]

# A block, its random numbers and the temporaries of the split stay in the second-level cache.
BLOCK_ELEMENTS = 1 << 15


def block_rows(width: int) -> int:
    """Rows of a block of a matrix of this width; randomness is keyed by the number of the block."""
    return max(1, BLOCK_ELEMENTS // max(width, 1))


def normal(plan: Plan, tensor: TensorPlan, position: int, shape: tuple[int, ...]) -> Array:
    """Normal numbers of std ``initializer_range``, keyed by seed, tensor and position."""
    key = random_bits(plan.symmetry.seed, tensor.key + "#new", position, 8)
    generator = np.random.Generator(np.random.Philox(int.from_bytes(key, "little")))
    numbers = generator.standard_normal(shape, dtype=np.float32)
    std = np.float32(plan.config.get("initializer_range", 0.02))
    return (numbers * std).astype(_dtype(tensor))


def fresh_rows(
    plan: Plan, tensor: TensorPlan, first: int, count: int
) -> Iterator[tuple[int, Array]]:
    """(byte offset in the tensor, block of rows) of random rows; none where rows are read.

    Whoever reads a new unit begins at zero, a hole; so growth stays exact.
    """
    rows = tensor.dims[0]
    if rows is not None and rows.consumes:
        return
    width = int(np.prod(tensor.output.shape[1:]))
    step = block_rows(width)
    for row in range(first, first + count, step):
        block = normal(plan, tensor, row, (min(step, first + count - row), width))
        yield row * width * block.itemsize, block


def constant(tensor: TensorPlan) -> Array | None:
    """A tensor of ones, or the closed gain of a norm that adds an offset; None: neither."""
    if tensor.action == "closed":
        return np.full(tensor.output.shape, -tensor.gain_offset).astype(_dtype(tensor))
    return np.ones(tensor.output.shape, _dtype(tensor)) if tensor.init == "ones" else None


def _dtype(tensor: TensorPlan) -> np.dtype[Any]:
    dtype = DTYPES[tensor.output.dtype].numpy
    assert dtype is not None
    return dtype
