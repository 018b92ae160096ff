"""``--warm-start shrink-pad-perturb``: a larger model from the shrunk weights of a smaller one.

Every matrix W of the old model, embeddings among them, becomes

    shrink x pad(W) + perturb x R

where pad writes zeros for every new row and column and R is the start of the matrix in a model from
scratch: the class's spread, what writes the residual stream times 1 / sqrt(2 L), times
sqrt(old fan-in / new fan-in) as muP asks of a matrix whose fan-in grows (arXiv 2203.03466, table
3). New layers are R alone. Gains, biases and lambda vectors keep their values; new entries of them
start as the class starts them. Sources: arXiv 2411.07340 (shrink, zero-pad, perturb under muP) and
arXiv 2605.13405 (the function need not be preserved); shrink and perturb itself is arXiv
1910.08475. Not exact, whatever the factors: with shrink 1 and perturb 0 a padded norm still
divides by another root mean square.

Where an exact growth would put copies the padding has zeros, so new heads stand inside the groups
of their key/value heads. Numbers are keyed by seed, tensor name and block of written rows: shards
and threads change no byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.families.unit_layout import IntArray
from growkit.surgery.axis_map import NEW
from growkit.surgery.dim_map import DimMap
from growkit.surgery.new_weights import block_rows, normal
from growkit.surgery.plan import Plan
from growkit.surgery.symmetry import compute_dtype
from growkit.surgery.tensor_plans import TensorPlan

Array = npt.NDArray[Any]

# Source rows closer than this are read in one piece.
NEAR = 64


def warm_blocks(
    plan: Plan, tensor: TensorPlan, look: Callable[[Array], None] | None = None
) -> Iterator[tuple[int, Array]]:
    """(byte offset in the matrix, block of written rows) of a matrix with old weights.

    Args:
        plan: with a warm start.
        tensor: one matrix, whose ``noise`` is the factor on the class's spread.
        look: given every block of source rows that is read.
    """
    start = plan.growth.warm_start
    assert start is not None and tensor.source is not None
    rows, columns = tensor.dims[0], tensor.dims[-1]
    height, width = tensor.output.shape
    kind = compute_dtype(tensor.stored)
    row_of = _elements(rows, height)
    column_of = _elements(columns, width)
    known = np.flatnonzero(column_of != NEW)
    for first in range(0, height, block_rows(width)):
        sources = row_of[first : first + block_rows(width)]
        block = np.zeros((len(sources), width), kind)
        for place, wanted in _runs(sources):
            low = int(wanted[0])
            old = plan.checkpoint.read_rows(
                tensor.source, low, int(wanted[-1]) - low + 1, tensor.source_start
            )
            if look is not None:
                look(old)
            block[np.ix_(place, known)] = old[wanted - low][:, column_of[known]]
        block *= kind.type(tensor.factor * start.shrink)
        if tensor.noise:
            block += normal(plan, tensor, first, block.shape, "perturb", tensor.noise, kind)
        yield first * width * tensor.stored.itemsize, block.astype(tensor.stored)


def _elements(dim: DimMap | None, size: int) -> IntArray:
    """Old element of every written one, or ``NEW``; shape [size]."""
    if dim is None:
        return np.arange(size)
    inside = dim.source[:, None] * dim.block + np.arange(dim.block)
    return np.where(dim.source[:, None] == NEW, NEW, inside).reshape(-1)


def _runs(sources: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """(places, old rows) of the rows with a source, cut where the old rows are far apart."""
    place = np.flatnonzero(sources != NEW)
    if not len(place):
        return
    steps = np.diff(sources[place])
    cuts = np.flatnonzero((steps <= 0) | (steps > NEAR)) + 1
    for part in np.split(place, cuts):
        yield part, sources[part]
