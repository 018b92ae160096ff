"""A grown tensor against its source, by the plan: which parts are old, copies, new, changed."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from growkit.checkpoint import Checkpoint
from growkit.diff.difference import (
    BLOCK_BYTES,
    Array,
    Difference,
    compare_tensors,
)
from growkit.families.differential import LAMBDA_ROLES
from growkit.surgery.axis_map import NEW
from growkit.surgery.dim_map import DimMap, ranges_of
from growkit.surgery.effect import Fill
from growkit.surgery.expand import RowTargets, computed_blocks, part_of, rescale, row_scale
from growkit.surgery.lambdas import change_lambda
from growkit.surgery.new_weights import NewRows, Redrawn, block_rows, token_blocks
from growkit.surgery.plan import Plan
from growkit.surgery.tensor_plans import Action, TensorPlan
from growkit.surgery.warm_start import warm_blocks

Ranges = list[tuple[int, int]]
NEW_LABELS = {Fill.ZERO: "zero", Fill.MEAN: "mean", Fill.INIT: "new", Fill.TOKEN: "tokens"}


def dim_parts(dim: DimMap) -> dict[str, Ranges]:
    """Element ranges [start, end) of a dimension: ``old``, ``copies`` and what is new: ``zero``,
    ``mean`` (of the old entries), ``tokens`` (new ones) and ``new`` (random, or one in a gain)."""
    kinds = {
        "old": np.repeat((dim.source != NEW) & (dim.rank == 0), dim.block),
        "copies": np.repeat((dim.source != NEW) & (dim.rank > 0), dim.block),
        **{label: dim.new(fill) for fill, label in NEW_LABELS.items()},
    }
    return {kind: ranges_of(here) for kind, here in kinds.items() if here.any()}


def explain(plan: Plan, tensor: TensorPlan, grown: Checkpoint) -> Difference:
    """How far the written tensor is from what its plan makes of the source; streamed.

    Copies are compared with the unit that they copy; the parts of shared weights are summed (in
    float64, where the sum is exact) and compared with the source's weight. New units are compared
    with zero or with the mean of the old entries, where the plan says so; random ones are not
    compared.
    """
    return EXPLAINERS[tensor.action](plan, tensor, grown)


def _new(plan: Plan, tensor: TensorPlan, grown: Checkpoint) -> Difference:
    return Difference()


def _copied(plan: Plan, tensor: TensorPlan, grown: Checkpoint) -> Difference:
    assert tensor.source is not None
    return compare_tensors(plan.checkpoint, tensor.source, grown, tensor.output.name)


def _mapped(plan: Plan, tensor: TensorPlan, grown: Checkpoint) -> Difference:
    if len(tensor.output.shape) != 3:
        return _Walk(plan, tensor, grown).run()
    result = Difference()
    for matrix in tensor.matrices():
        result.add(explain(plan, matrix, grown))
    return result


def _computed(plan: Plan, tensor: TensorPlan, grown: Checkpoint) -> Difference:
    """The calculation is done again."""
    result = Difference()
    for offset, block in computed_blocks(plan, tensor):
        found = grown.read_entries(tensor.output.name, offset // block.itemsize, block.size)
        result.look(found, block.reshape(-1))
    return result


def _perturbed(plan: Plan, tensor: TensorPlan, grown: Checkpoint) -> Difference:
    """Shrunk, padded and perturbed again, matrix by matrix."""
    result = Difference()
    for matrix in tensor.matrices():
        for offset, block in warm_blocks(plan, matrix):
            first = offset // (block.shape[1] * block.itemsize)
            found = grown.read_rows(tensor.output.name, first, len(block), matrix.output_start)
            result.look(found, block)
    return result


def _constant(plan: Plan, tensor: TensorPlan, grown: Checkpoint) -> Difference:
    """Zeros, or the closed gain of a norm that adds an offset."""
    result, name = Difference(), tensor.output.name
    value = -tensor.gain_offset if tensor.action is Action.CLOSED else 0.0
    shape = grown.tensors[name].shape
    count, step = prod(shape), _step((1, 1))
    for first in range(0, count, step):
        found = grown.read_entries(name, first, min(step, count - first)).astype(np.float64)
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


def _half_unit(values: Array, stored: np.dtype[Any]) -> Array:
    """Half the distance to the next number of the stored dtype: what rounding may have done."""
    return 0.51 * np.spacing(np.abs(values).astype(stored)).astype(np.float64)


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
        self.new_rows = NewRows(self.rows, tensor.output.shape[-1])
        self.redrawn = Redrawn(tensor, plan.symmetry.seed) if tensor.redrawn else None
        self.result = Difference()

    def run(self) -> Difference:
        if self.vector:
            found = self.grown.read(self.name)[None]  # vectors are never stacked
            self._compare(found, self.source.read(self.source_name)[None], None)
            self._new_columns(found)
            return self.result
        shape = self.source.tensors[self.source_name].shape[-2:]
        rows = shape[0]
        targets, scale = RowTargets(self.rows, rows), row_scale(self.rows, rows)
        step = min(_step(shape), _step(self.tensor.output.shape))
        if self.tensor.share is not None:
            step = block_rows(shape[1])
        for first in range(0, rows, step):
            height = min(step, rows - first)
            old = self._old(first, height)
            factors = None if scale is None else scale[first : first + height]
            self._block(old, factors, list(targets.within(first, first + height)))
        self._look_at_new_rows(step)
        return self.result

    def _old(self, first: int, count: int) -> Array:
        """Source rows, or the part of them that this copy of an expert carries."""
        block = self.source.read_rows(self.source_name, first, count, self.tensor.source_start)
        position = first // block_rows(block.shape[1])
        return part_of(block, self.tensor, self.plan.symmetry, position)

    def _found(self, first: int, count: int) -> Array:
        return self.grown.read_rows(self.name, first, count, self.tensor.output_start)

    def _block(
        self, old: Array, factors: Array | None, targets: list[tuple[int, int, int, int]]
    ) -> None:
        if self.rows is not None and self.rows.perturbed is not None:
            # The noise on the copies of a row has the mean zero.
            total, met = np.zeros((len(old), self.tensor.output.shape[1])), np.zeros(len(old))
            for _, offset, row, count in targets:
                total[offset : offset + count] += self._read(row, count)
                met[offset : offset + count] += 1
            self._compare(total / met[:, None], old, factors)
            return
        if self.rows is None or not self.rows.shares:
            for _, offset, row, count in targets:
                found = self._read(row, count)
                here = slice(offset, offset + count)
                if self.redrawn is not None:
                    new = self.redrawn.mask(row, found.shape)
                    found = np.where(new, self._scaled(old[here], found.dtype), found)
                self._compare(found, old[here], None if factors is None else factors[here])
            return
        # Copies of a row share it: sum them, then look at the columns.
        width = self.tensor.output.shape[1]
        copies = max(rank for rank, *_ in targets) + 1
        parts = np.zeros((copies, len(old), width))
        several = np.zeros(len(old), np.bool_)
        for rank, offset, row, count in targets:
            parts[rank, offset : offset + count] = self._read(row, count)
            several[offset : offset + count] |= rank > 0
        if several.any() and (self.columns is None or not self.columns.shares):
            new, origin = self._known_columns(old.shape[1])
            whole = self._scaled(old[:, origin], np.dtype(np.float64), factors)[several]
            self.result.look_share(copies, list(parts[:, several][:, :, new]), whole.astype(float))
        self._compare(parts.sum(axis=0), old, factors)

    def _known_columns(self, old_width: int) -> tuple[Array, Array]:
        """Written columns with a source, and the old columns that they copy."""
        if self.columns is None:
            return np.arange(old_width), np.arange(old_width)
        units, block = self.columns.source, self.columns.block
        origin = (units[:, None] * block + np.arange(block)).reshape(-1)
        here = np.flatnonzero(np.repeat(units != NEW, block))
        return here, origin[here]

    def _read(self, row: int, count: int) -> Array:
        """Written rows that are made of old ones; what is new in them is looked at."""
        found = self._found(row, count)
        self._new_columns(found)
        self.new_rows.add(found)
        return found

    def _compare(self, found: Array, old: Array, factors: Array | None) -> None:
        """Written rows [rows, columns], the source rows [rows, old columns] they are made of, and
        the factor [rows] on each."""
        if self.columns is None:
            self.result.look(found, self._scaled(old, found.dtype, factors))
            return
        source, block = self.columns.source, self.columns.block
        known = source != NEW
        units = found.reshape(len(found), -1, block)
        old_units = old.reshape(len(old), -1, block)
        if not self.columns.consumes:
            self._plain(units[:, known], old_units[:, source[known]], factors, known)
            return
        if not self.columns.shares:
            self._plain(units[:, known], old_units[:, source[known]], factors, known)
            return
        wide = units.astype(np.float64)
        whole = self._scaled(old, found.dtype, factors).reshape(old_units.shape)
        total = np.zeros(old_units.shape)
        rounding = np.zeros(old_units.shape)
        for copies in np.unique(self.columns.multiplicity[known]).tolist():
            places = [
                np.flatnonzero((self.columns.multiplicity == copies) & (self.columns.rank == rank))
                for rank in range(copies)
            ]
            order = source[places[0]]
            parts = [wide[:, here[np.argsort(source[here])]] for here in places]
            total[:, np.sort(order)] = sum(parts)
            rounding[:, np.sort(order)] = sum(_half_unit(part, found.dtype) for part in parts)
            if copies > 1:
                self.result.look_share(copies, parts, whole[:, np.sort(order)].astype(np.float64))
        rounding += _half_unit(whole.astype(np.float64), found.dtype)
        self.result.look(total, whole, by_value=True, rounding=rounding)

    def _plain(self, units: Array, expected: Array, factors: Array | None, known: Array) -> None:
        assert self.columns is not None
        scale = self.columns.element_scale
        if scale is not None:
            scale = scale[np.repeat(known, self.columns.block)]
        found = units.reshape(len(units), -1)
        flat = expected.reshape(len(expected), -1)
        self.result.look(found, self._scaled(flat, found.dtype, factors, scale))

    def _scaled(
        self,
        old: Array,
        stored: np.dtype[Any],
        rows: Array | None = None,
        columns: Array | None = None,
    ) -> Array:
        return rescale(old, self.tensor.factor, self.tensor.gain_offset, stored, rows, columns)

    def _new_columns(self, found: Array) -> None:
        """New entries of written rows [rows, columns] that are not random."""
        if self.columns is None:
            return
        for fill in self.columns.fills:
            new = self.columns.new(fill)
            if fill == Fill.ZERO:
                self._is_zero(found[:, new])
            elif fill == Fill.MEAN:
                known = np.repeat(self.columns.source != NEW, self.columns.block)
                self._is_mean(
                    found[:, new], found[:, known].mean(axis=1, dtype=np.float64)[:, None]
                )

    def _look_at_new_rows(self, step: int) -> None:
        for start, count, fill in self.new_rows.runs:
            if fill == Fill.TOKEN:
                self._are_tokens(start, count)
                continue
            for first in range(start, start + count, step):
                height = min(step, start + count - first)
                if fill == Fill.ZERO:
                    self._is_zero(self._found(first, height))
                elif fill == Fill.MEAN:
                    found = self._found(first, height)
                    self._is_mean(found, self.new_rows.mean(np.dtype(np.float64)))

    def _are_tokens(self, start: int, count: int) -> None:
        """Rows of new tokens, made again."""
        for offset, block in token_blocks(self.plan, self.tensor, start, count):
            first = offset // (block.shape[1] * block.itemsize)
            self.result.look(self._found(first, len(block)), block)

    def _is_zero(self, found: Array) -> None:
        self.result.look(found, np.zeros_like(found), by_value=True)

    def _is_mean(self, found: Array, mean: Array) -> None:
        """Sums of other blocks may round to the neighbour; that is no difference."""
        wide, target = found.astype(np.float64), np.broadcast_to(mean, found.shape)
        unit = np.spacing(np.abs(target).astype(found.dtype)).astype(np.float64)
        near = np.abs(wide - target) <= 0.51 * unit
        self.result.look(found, np.where(near, found, target.astype(found.dtype)), by_value=True)


EXPLAINERS: dict[Action, Callable[[Plan, TensorPlan, Checkpoint], Difference]] = {
    Action.COPIED: _copied,
    Action.GROWN: _mapped,
    Action.RESCALED: _mapped,
    Action.REDRAWN: _mapped,
    Action.LAMBDA: _lambdas,
    Action.PERTURBED: _perturbed,
    Action.COMPUTED: _computed,
    Action.NEW: _new,
    Action.ZERO: _constant,
    Action.CLOSED: _constant,
}
