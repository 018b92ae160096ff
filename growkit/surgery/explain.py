"""A grown tensor against its source, by the plan: which parts are old, copies, new, changed."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import Checkpoint
from growkit.families.differential import LAMBDA_ROLES
from growkit.surgery.axis_map import NEW
from growkit.surgery.compare import (
    BLOCK_BYTES,
    Array,
    Difference,
    compare_tensors,
    read_entries,
    read_rows,
)
from growkit.surgery.dim_map import DimMap
from growkit.surgery.expand import RowTargets
from growkit.surgery.expert_share import part_of
from growkit.surgery.fresh import block_rows
from growkit.surgery.lambdas import change_lambda
from growkit.surgery.plan import Plan
from growkit.surgery.split import compute_dtype
from growkit.surgery.tensor_plans import TensorPlan

Ranges = list[tuple[int, int]]


def dim_parts(dim: DimMap) -> dict[str, Ranges]:
    """Element ranges [start, end) of a dimension: ``old``, ``copies`` and ``new``."""
    kinds = {
        "old": (dim.source != NEW) & (dim.rank == 0),
        "copies": (dim.source != NEW) & (dim.rank > 0),
        "new": dim.source == NEW,
    }
    return {kind: _ranges(here, dim.block) for kind, here in kinds.items() if here.any()}


def _ranges(here: npt.NDArray[np.bool_], block: int) -> Ranges:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], here, [False]]).astype(np.int8)))
    return [(int(a) * block, int(b) * block) for a, b in edges.reshape(-1, 2)]


def explain(plan: Plan, tensor: TensorPlan, grown: Checkpoint) -> Difference:
    """How far the written tensor is from what its plan makes of the source; streamed.

    Copies are compared with the unit that they copy; the parts of shared weights are summed (in
    float64, where the sum is exact) and compared with the source's weight. New units that read are
    compared with zero; new rows and tensors without a source are random and not compared.
    """
    name = tensor.output.name
    if tensor.source is None:
        return Difference()
    if tensor.action in ("zero", "closed"):
        return _constant(grown, name, 0.0 if tensor.action == "zero" else -tensor.gain_offset)
    if tensor.action == "copied":
        return compare_tensors(plan.checkpoint, tensor.source, grown, name)
    if tensor.lambda_change is not None:
        return _lambdas(plan, tensor, grown)
    if len(tensor.output.shape) == 3:
        result = Difference()
        for matrix in tensor.matrices():
            result.add(explain(plan, matrix, grown))
        return result
    return _Walk(plan, tensor, grown).run()


def _constant(grown: Checkpoint, name: str, value: float) -> Difference:
    result = Difference()
    shape = grown.tensors[name].shape
    count, step = prod(shape), _step((1, 1))
    for first in range(0, count, step):
        found = read_entries(grown, name, first, min(step, count - first)).astype(np.float64)
        result.look(found, np.full(found.shape, value), by_value=True)
    return result


def _lambdas(plan: Plan, tensor: TensorPlan, grown: Checkpoint) -> Difference:
    assert tensor.source is not None and tensor.lambda_change is not None
    base = tensor.source.removesuffix(tensor.role)
    q1, k1, q2, k2 = (plan.checkpoint.read(base + role) for role in LAMBDA_ROLES)
    expected = change_lambda(q1, k1, q2, k2, tensor.lambda_change)
    result = Difference()
    result.look(grown.read(tensor.output.name), expected[LAMBDA_ROLES.index(tensor.role)])
    return result


def _step(shape: tuple[int, ...]) -> int:
    """Rows of a block whose float64 copies stay small."""
    return max(1, BLOCK_BYTES // (8 * max(int(np.prod(shape[1:])), 1)))


class _Walk:
    """Blocks of source rows, each beside all the written rows that are made of it."""

    def __init__(self, plan: Plan, tensor: TensorPlan, grown: Checkpoint) -> None:
        assert tensor.source is not None
        self.plan, self.source, self.grown, self.tensor = plan, plan.checkpoint, grown, tensor
        self.name, self.source_name = tensor.output.name, tensor.source
        self.vector = len(tensor.output.shape) == 1
        # A vector is a matrix of one row.
        self.rows = None if self.vector else tensor.dims[0]
        self.columns = tensor.dims[-1]
        self.result = Difference()

    def run(self) -> Difference:
        if self.vector:
            found = self.grown.read(self.name)[None]  # vectors are never stacked
            self._compare(found, self.source.read(self.source_name)[None])
            return self.result
        shape = self.source.tensors[self.source_name].shape[-2:]
        rows = shape[0]
        targets = RowTargets(self.rows, rows)
        step = min(_step(shape), _step(self.tensor.output.shape))
        if self.tensor.share is not None:
            step = block_rows(shape[1])
        for first in range(0, rows, step):
            height = min(step, rows - first)
            old = self._old(first, height)
            self._block(old, list(targets.within(first, first + height)))
        if self.rows is not None and self.rows.consumes:
            self._new_rows_are_zero(step)
        return self.result

    def _old(self, first: int, count: int) -> Array:
        """Source rows, or the part of them that this copy of an expert carries."""
        block = read_rows(self.source, self.source_name, first, count, self.tensor.source_start)
        position = first // block_rows(block.shape[1])
        return part_of(block, self.tensor, self.plan.symmetry, position)

    def _found(self, first: int, count: int) -> Array:
        return read_rows(self.grown, self.name, first, count, self.tensor.output_start)

    def _block(self, old: Array, targets: list[tuple[int, int, int, int]]) -> None:
        if self.rows is None or not self.rows.shares:
            for _, offset, row, count in targets:
                found = self._found(row, count)
                self._compare(found, old[offset : offset + count])
            return
        # Copies of a row share it: sum them, then look at the columns.
        width = self.tensor.output.shape[1]
        copies = max(rank for rank, *_ in targets) + 1
        parts = np.zeros((copies, len(old), width))
        for rank, offset, row, count in targets:
            parts[rank, offset : offset + count] = self._found(row, count)
        if self.columns is None:
            self.result.look_share(copies, list(parts), old.astype(np.float64))
        self._compare(parts.sum(axis=0), old)

    def _compare(self, found: Array, old: Array) -> None:
        """Written rows [rows, columns] and the source rows [rows, old columns] they are made of."""
        if self.columns is None:
            self.result.look(found, self._scaled(old, found.dtype))
            return
        source, block = self.columns.source, self.columns.block
        known = source != NEW
        units = found.reshape(len(found), -1, block)
        old_units = old.reshape(len(old), -1, block)
        if not self.columns.consumes:
            expected = old_units[:, source[known]]
            self.result.look(units[:, known], self._scaled(expected, found.dtype))
            return
        if not known.all():
            self._is_zero(units[:, ~known])
        if not self.columns.shares:
            self.result.look(
                units[:, known], self._scaled(old_units[:, source[known]], found.dtype)
            )
            return
        wide, whole = units.astype(np.float64), self._scaled(old_units, found.dtype)
        total = np.zeros(old_units.shape)
        for copies in np.unique(self.columns.multiplicity[known]).tolist():
            places = [
                np.flatnonzero((self.columns.multiplicity == copies) & (self.columns.rank == rank))
                for rank in range(copies)
            ]
            order = source[places[0]]
            parts = [wide[:, here[np.argsort(source[here])]] for here in places]
            total[:, np.sort(order)] = sum(parts)
            if copies > 1:
                self.result.look_share(copies, parts, whole[:, np.sort(order)].astype(np.float64))
        self.result.look(total, whole, by_value=True)

    def _scaled(self, old: Array, stored: np.dtype[Any]) -> Array:
        if self.tensor.factor == 1.0:
            return old
        kind = np.dtype(np.float64) if self.tensor.gain_offset else compute_dtype(old.dtype)
        offset, factor = kind.type(self.tensor.gain_offset), kind.type(self.tensor.factor)
        scaled: Array = ((old.astype(kind) + offset) * factor - offset).astype(stored)
        return scaled

    def _new_rows_are_zero(self, step: int) -> None:
        assert self.rows is not None
        for old, new, count in self.rows.runs:
            if old != NEW:
                continue
            for first in range(new, new + count, step):
                height = min(step, new + count - first)
                self._is_zero(self._found(first, height))

    def _is_zero(self, found: Array) -> None:
        self.result.look(found, np.zeros_like(found), by_value=True)
