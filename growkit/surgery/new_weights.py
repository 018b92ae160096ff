"""Weights without a source: random normal numbers, ones, means, or what closes a gain; and units of
an expert that are drawn anew.

Drop-Upcycling (arXiv:2502.19261, section 3): for each expert a random set of intermediate units is
chosen; their rows of the gate and up projections and their columns of the down projection become
normal numbers with the mean and the standard deviation of the old matrix. Not exact: the part of
the FFN that is drawn anew is forgotten.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import DTYPES, Checkpoint
from growkit.families.differential import LAMBDA_ROLES, LAMBDA_STD
from growkit.surgery.axis_map import NEW
from growkit.surgery.dim_map import DimMap, ranges_of
from growkit.surgery.effect import Fill
from growkit.surgery.expand import ColumnMoves, rescale
from growkit.surgery.plan import Plan
from growkit.surgery.symmetry import random_bits
from growkit.surgery.tensor_plans import Action, TensorPlan
from growkit.surgery.token_rows import TokenRows

Array = npt.NDArray[Any]

# A block, its random numbers and the temporaries of the split stay in the second-level cache.
BLOCK_ELEMENTS = 1 << 15


CONSTANTS = {"ones": 1.0, "thirds": 1.0 / 3.0}


def block_rows(width: int) -> int:
    """Rows of a block of a matrix of this width; randomness is keyed by the number of the block."""
    return max(1, BLOCK_ELEMENTS // max(width, 1))


def normal(
    plan: Plan,
    tensor: TensorPlan,
    position: int,
    shape: tuple[int, ...],
    what: str = "new",
    factor: float = 1.0,
    dtype: np.dtype[Any] | None = None,
) -> Array:
    """Normal numbers of the tensor's own std, keyed by seed, tensor, ``what`` and position.

    ``dtype``: of the numbers; absent: the stored one.
    """
    generator = _generator(plan.symmetry.seed, f"{tensor.key}#{what}", position)
    numbers = generator.standard_normal(shape, dtype=np.float32)
    return (numbers * np.float32(_std(plan, tensor) * factor)).astype(dtype or tensor.stored)


def _std(plan: Plan, tensor: TensorPlan) -> float:
    """As the written model's class starts it from scratch; less what a new layer writes."""
    if tensor.role in LAMBDA_ROLES:
        names = ("lambda_std", "lambda_std_dev")
        return float(next((plan.config[n] for n in names if n in plan.config), LAMBDA_STD))
    std = float(plan.config.get("initializer_range", plan.config.get("init_std", 0.02)))
    return std * tensor.factor if tensor.action is Action.NEW else std


class NewColumns:
    """Fills the columns without a source; worked out once, applied to many blocks."""

    def __init__(self, plan: Plan, tensor: TensorPlan) -> None:
        self.plan, self.tensor = plan, tensor
        columns = tensor.dims[-1]
        self.any = columns is not None and bool(columns.fills)
        if columns is not None:
            self.known = np.repeat(columns.source != NEW, columns.block)
            self.random, self.mean, self.zero = (
                np.flatnonzero(columns.new(fill)) for fill in (Fill.INIT, Fill.MEAN, Fill.ZERO)
            )

    def fill(self, block: Array, position: int, part: int = 0) -> None:
        """Fill a block [rows, columns] made from old rows, whose new columns are zero so far.

        ``position`` and ``part`` (which share of the rows) are part of the random key, so equal
        copies of a row get the same numbers.
        """
        if not self.any:
            return
        if len(self.random):
            shape = (len(block), len(self.random))
            what = f"columns{part or ''}"
            block[:, self.random] = normal(self.plan, self.tensor, position, shape, what)
        self.average(block)

    def cut(self, block: Array) -> None:
        """Make zeros and means of the new columns of random rows."""
        if self.any:
            block[:, self.zero] = 0
            self.average(block)

    def average(self, block: Array) -> None:
        """Write the mean of the other columns, in float64, where it belongs."""
        if self.any and len(self.mean):
            means = block[:, self.known].mean(axis=1, dtype=np.float64)
            block[:, self.mean] = means[:, None].astype(block.dtype)


class NewRows:
    """Collects what the rows without a source need to know of the others."""

    def __init__(self, rows: DimMap | None, width: int) -> None:
        self.runs: list[tuple[int, int, Fill]] = []
        for fill in rows.fills if rows else ():
            assert rows is not None
            self.runs += [(a, b - a, fill) for a, b in ranges_of(rows.new(fill))]
        self.averages = any(fill == Fill.MEAN for _, _, fill in self.runs)
        self.total, self.count = np.zeros(width if self.averages else 0), 0

    def add(self, block: Array) -> None:
        """Written rows [rows, columns] that are no new ones."""
        if self.averages:
            self.total += block.sum(axis=0, dtype=np.float64)
            self.count += len(block)

    def mean(self, stored: np.dtype[Any]) -> Array:
        """One row: the mean of all that were added."""
        average: Array = (self.total / max(self.count, 1)).astype(stored)
        return average


def fresh_rows(
    plan: Plan, tensor: TensorPlan, first: int, count: int
) -> Iterator[tuple[int, Array]]:
    """(byte offset in the tensor, block of rows) of random rows."""
    columns = NewColumns(plan, tensor)
    width = int(np.prod(tensor.output.shape[1:]))
    step = -(-block_rows(width) // tensor.repeated) * tensor.repeated
    for row in range(first, first + count, step):
        height = min(step, first + count - row) // tensor.repeated
        block = normal(plan, tensor, row, (height, width)).repeat(tensor.repeated, axis=0)
        columns.cut(block)
        yield row * width * block.itemsize, block


def token_rows(plan: Plan, tensor: TensorPlan) -> TokenRows:
    """What the rows of new tokens in a table are made of."""
    assert tensor.source is not None and plan.growth.new_tokens is not None
    return TokenRows(plan.checkpoint, tensor.source, plan.growth.new_tokens, plan.symmetry.seed)


def token_blocks(
    plan: Plan, tensor: TensorPlan, first: int, count: int
) -> Iterator[tuple[int, Array]]:
    """(byte offset in the tensor, block of rows) of the rows of new tokens.

    They are made in the width of the source and grow as the old rows do.
    """
    made, moves = token_rows(plan, tensor), ColumnMoves(tensor.dims[-1])
    new_columns, stored = NewColumns(plan, tensor), tensor.stored
    columns = tensor.dims[-1]
    scale = columns.element_scale if columns is not None else None
    row_bytes = tensor.output.shape[1] * stored.itemsize
    step = block_rows(made.width)
    for row in range(first, first + count, step):
        height = min(step, first + count - row)
        old = made.of(np.arange(row, row + height)).astype(made.dtype)
        # Behind the positions of the old blocks, so that no two share random numbers.
        position = (1 << 32) + row
        block = moves.apply(old, plan.symmetry, tensor.key, position)
        block = rescale(block, tensor.factor, tensor.gain_offset, stored, None, scale)
        new_columns.fill(block, position)
        yield row * row_bytes, block


def constant(tensor: TensorPlan) -> Array | None:
    """A tensor of one number: a gain, or the closed one of a norm that adds an offset; None: it is
    random, or zero."""
    if tensor.action is Action.CLOSED:
        value = -tensor.gain_offset
    elif tensor.gain_offset and tensor.factor != 1.0:
        value = tensor.gain_offset * (tensor.factor - 1.0)  # the gain is factor x offset
    elif tensor.init in CONSTANTS:
        value = CONSTANTS[tensor.init] * tensor.factor
    else:
        return None
    return np.full(tensor.output.shape, value).astype(tensor.stored)


# -- units drawn anew ------------------------------------------------------------------------------

STEP = 1 << 17
DOWN = ("down", "fused_down")


class Redrawn:
    """Which entries of one matrix of an expert are new, and what they become.

    Args:
        tensor: a matrix (of a stack: see :meth:`TensorPlan.matrices`) with a part to draw anew.
        seed: of the plan.
    """

    def __init__(self, tensor: TensorPlan, seed: int) -> None:
        self.seed, self.key = seed, f"{tensor.key}#redrawn"
        self.by_columns = tensor.role in DOWN
        self.parts = parts_of(tensor)
        width = tensor.output.shape[1 if self.by_columns else 0] // self.parts
        # The same units in the three matrices of an expert.
        chooser = _generator(seed, f"layer {tensor.layer}, expert {tensor.expert}#units", 0)
        units = np.zeros(width, np.bool_)
        units[chooser.permutation(width)[: round(tensor.redrawn * width)]] = True
        self.units = np.tile(units, self.parts)

    def mask(self, first: int, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """New entries among the rows [first, first + shape[0])."""
        here = self.units[None] if self.by_columns else self.units[first : first + shape[0], None]
        return np.broadcast_to(here, shape)

    def apply(self, block: Array, first: int, position: int, moments: Array) -> Array:
        """A block of rows from ``first`` on, with its new entries; ``position`` keys them.

        Args:
            moments: of the source, from :meth:`Moments.of`.
        """
        drawn = _generator(self.seed, self.key, position)
        numbers = drawn.standard_normal(block.shape, dtype=np.float32)
        rows = np.arange(first, first + len(block))
        part = rows * 0 if self.by_columns else rows * self.parts // len(self.units)
        mean, std = moments[part].astype(np.float32).T[..., None]
        return np.where(self.mask(first, block.shape), numbers * std + mean, block).astype(
            block.dtype
        )


class Moments:
    """Mean and standard deviation of source matrices, each worked out once for all experts."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self._lock = checkpoint, threading.Lock()
        self._known: dict[tuple[str, int], Array] = {}

    def of(self, tensor: TensorPlan) -> Array:
        """float64 [parts, 2]: mean and standard deviation of the gates (and of the ups)."""
        assert tensor.source is not None
        key = (tensor.source, tensor.source_start)
        with self._lock:
            if key not in self._known:
                self._known[key] = self._measure(tensor.source, tensor.source_start, tensor)
            return self._known[key]

    def _measure(self, name: str, start: int, tensor: TensorPlan) -> Array:
        info, parts = self.checkpoint.tensors[name], parts_of(tensor)
        kind = DTYPES[info.dtype].numpy
        assert kind is not None
        count = prod(info.shape[-2:]) // parts
        result = np.zeros((parts, 2))
        for part in range(parts):
            total = squares = 0.0
            for first in range(0, count, STEP):
                block = np.empty(min(STEP, count - first), kind)
                place = start + (part * count + first) * block.itemsize
                self.checkpoint.read_into(name, block, place)
                wide = block.astype(np.float64)
                total, squares = total + wide.sum(), squares + np.square(wide).sum()
            mean = total / count
            result[part] = mean, max(squares / count - mean**2, 0.0) ** 0.5
        return result


def parts_of(tensor: TensorPlan) -> int:
    """A stack's matrix holds all gates and then all ups."""
    return 2 if tensor.role == "gate_up" else 1


def _generator(seed: int, key: str, position: int) -> np.random.Generator:
    bits = random_bits(seed, key, position, 8)
    return np.random.Generator(np.random.Philox(int.from_bytes(bits.tobytes(), "little")))
