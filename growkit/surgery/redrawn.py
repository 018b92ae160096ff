# SPDX-License-Identifier: Apache-2.0
"""Units of an expert that are drawn anew, so that experts differ from the start.

Drop-Upcycling (arXiv 2502.19261, section 3): for each expert a random set of intermediate units is
chosen; their rows of the gate and up projections and their columns of the down projection become
normal numbers with the mean and the standard deviation of the old matrix. Not exact: the part of
the FFN that is drawn anew is forgotten.
"""

from __future__ import annotations

import threading
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import DTYPES, Checkpoint
from growkit.surgery.symmetry import random_bits
from growkit.surgery.tensor_plans import TensorPlan

Array = npt.NDArray[Any]
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
