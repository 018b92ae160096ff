"""Tensors that a conversion calculates, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import DTYPES
from growkit.surgery.plan import Plan
from growkit.surgery.tensor_plans import TensorPlan

# Sources of a block are read whole rows at a time; a few MB keep the memory bounded.
BLOCK_ELEMENTS = 1 << 20


def computed_blocks(plan: Plan, tensor: TensorPlan) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """(byte offset in the tensor, block of rows in the stored dtype) of a computed tensor.

    A vector is a matrix of one column.
    """
    computed, dtype = tensor.computed, DTYPES[tensor.output.dtype].numpy
    assert computed is not None and dtype is not None
    rows, *rest = tensor.output.shape
    width = prod(rest)
    layer = tensor.layer_source.source if tensor.layer_source else 0
    step = max(1, BLOCK_ELEMENTS // max(width, 1))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        block = computed.rows(plan.checkpoint, layer, first, count)
        yield (
            first * width * dtype.itemsize,
            np.ascontiguousarray(block.reshape(count, width).astype(dtype)),
        )
