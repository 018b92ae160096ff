"""Carry a plan out: stream the source through a few reused buffers into the planned shards.

Unchanged bytes are copied by range and looked at for NaN on the way, zeros stay holes, and only
shared columns are computed, in blocks that fit the cache. Tensors are independent, so threads
change nothing but the time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import DTYPES, ShardWriter, TensorInfo
from growkit.checkpoint.writer import ShardComparison
from growkit.core.process import available_cores, signals_held_back
from growkit.families.lambda_schedule import LAMBDA_ROLES
from growkit.surgery.effect import Fill
from growkit.surgery.expand import (
    ColumnMoves,
    RowTargets,
    computed_blocks,
    expand_rows,
    part_of,
    rescale,
    row_scale,
)
from growkit.surgery.lambdas import change_lambda
from growkit.surgery.new_weights import (
    Moments,
    NewColumns,
    NewRows,
    Redrawn,
    block_rows,
    constant,
    fresh_rows,
    normal,
    token_blocks,
    token_rows,
)
from growkit.surgery.plan import Plan
from growkit.surgery.source_checks import FiniteCheck
from growkit.surgery.tensor_plans import Action, TensorPlan
from growkit.surgery.warm_start import warm_blocks

Array = npt.NDArray[Any]
Advance = Callable[[int], None]

INPUT_BYTES = 1 << 20
# Written while it is still in the cache that it was read into.
COPY_BYTES = 1 << 19
KERNEL_COPY_BYTES = 1 << 25


def execute(
    plan: Plan,
    writer: ShardWriter | ShardComparison,
    *,
    threads: int | None = None,
    advance: Advance | None = None,
    on_non_finite: Callable[[str], None] | None = None,
) -> None:
    """Write every tensor of ``plan`` through ``writer``.

    The bytes depend on plan and seed alone, not on ``threads`` or the shards.

    Args:
        plan: from :func:`growkit.surgery.plan.build_plan`.
        writer: open on a shard plan of the same tensors.
        threads: workers; default :func:`usual_threads`. Memory grows by a few MB each.
        advance: called with the number of bytes done, from any thread.
        on_non_finite: called once with the name of each source tensor that holds NaN or infinity.
    """
    done = advance or (lambda count: None)
    work = _Work(plan, writer, done, on_non_finite or (lambda name: None))
    pieces = (piece for tensor in plan.tensors for piece in tensor.matrices())
    # The largest first, so that no thread is left alone with a large one at the end; where not all
    # files can stay open, one file after the other.
    places = writer.plan.places
    order = sorted(
        pieces,
        key=lambda t: (places[t.output.name].shard if writer.many_files else "", -t.nbytes),
    )
    workers = threads or usual_threads()
    # Weights that are not finite are reported by name; numpy need not say it once more.
    with ThreadPoolExecutor(workers, initializer=lambda: np.seterr(invalid="ignore")) as pool:
        try:
            with signals_held_back():
                futures = [pool.submit(work.write, tensor) for tensor in order]
            for future in futures:
                future.result()
        except BaseException:
            work.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def usual_threads() -> int:
    """Two a core that this process may use, since half of the time a thread waits for the disk; at
    most four more than cores, as a disk has no more than that to do at once."""
    cores = available_cores()
    return min(2 * cores, cores + 4)


class Stopped(Exception):
    """Another thread failed or the user interrupted; this one gives up."""


class _Work:
    def __init__(
        self,
        plan: Plan,
        writer: ShardWriter | ShardComparison,
        advance: Advance,
        on_non_finite: Callable[[str], None],
    ) -> None:
        self.plan, self.writer, self.advance = plan, writer, advance
        self.moments = Moments(plan.checkpoint)
        self.finite = FiniteCheck(plan.checkpoint, on_non_finite)
        self.stop = threading.Event()
        self.local = threading.local()

    def write(self, tensor: TensorPlan) -> None:
        """Write one tensor."""
        if self.stop.is_set():
            raise Stopped
        WRITERS[tensor.action](self, tensor)

    def _leave_zero(self, tensor: TensorPlan) -> None:
        """Zeros stay a hole."""
        self.advance(tensor.nbytes)

    def _write_mapped(self, tensor: TensorPlan) -> None:
        if len(tensor.output.shape) == 1:
            self._write_vector(tensor)
        elif not tensor.redrawn and tensor.factor == 1.0 and not _computes(tensor):
            self._copy_rows(tensor)
        else:
            self._write_matrix(tensor)

    # -- without arithmetic ---------------------------------------------------------------------

    def _copy_rows(self, tensor: TensorPlan) -> None:
        """Copy runs of whole rows as bytes; new rows start at random (or zero)."""
        assert tensor.source is not None
        info = self.plan.checkpoint.tensors[tensor.source]
        rows = tensor.dims[0] if tensor.dims else None  # a number of its own has no rows
        nbytes = info.nbytes if tensor.piece is None else info.nbytes // info.shape[0]
        unchecked = self.finite.claim(tensor.source, tensor.source_start)
        if not unchecked and rows is None:
            self._copy_in_kernel(tensor, info, nbytes)
            return
        # Reading to check and writing from the cache is as fast as a copy inside the kernel, which
        # has to touch two pages for every page because tensors do not begin at page boundaries.
        old_rows = rows.old_width if rows else 1
        targets = RowTargets(rows, old_rows, nbytes // max(old_rows, 1))
        buffer = self._buffer(min(COPY_BYTES, nbytes))
        for first in range(0, nbytes, COPY_BYTES):
            if self.stop.is_set():
                raise Stopped
            block = buffer[: nbytes - first]
            here = list(targets.within(first, first + len(block)))
            if not here and not unchecked:
                continue
            self.plan.checkpoint.read_into(tensor.source, block, tensor.source_start + first)
            self.finite.look(tensor.source, block)
            for _, offset, place, count in here:
                self._put(tensor, place, block[offset : offset + count])
                self.advance(count)
        if rows is not None:
            self._write_new_rows(tensor, NewRows(rows, 0))

    def _copy_in_kernel(self, tensor: TensorPlan, info: TensorInfo, nbytes: int) -> None:
        """Nothing moves and nothing is left to check."""
        start = info.start + tensor.source_start
        with self.plan.checkpoint.opened(info.shard) as descriptor:
            for offset in range(0, nbytes, KERNEL_COPY_BYTES):
                if self.stop.is_set():
                    raise Stopped
                part = min(KERNEL_COPY_BYTES, nbytes - offset)
                place = tensor.output_start + offset
                self.writer.copy(tensor.output.name, place, descriptor, start + offset, part)
                self.advance(part)

    def _put(self, tensor: TensorPlan, offset: int, block: Array) -> None:
        """Write at ``offset`` bytes of the tensor, or of its place in a stack."""
        self.writer.write(tensor.output.name, tensor.output_start + offset, block)

    def _initialise_rows(self, tensor: TensorPlan, first: int, count: int) -> None:
        for offset, block in fresh_rows(self.plan, tensor, first, count):
            self._put(tensor, offset, block)
        self.advance(count * (tensor.nbytes // tensor.output.shape[0]))

    def _write_new_rows(self, tensor: TensorPlan, rows: NewRows) -> None:
        row_bytes = tensor.nbytes // tensor.output.shape[0]
        for first, count, fill in rows.runs:
            if fill == Fill.INIT:
                self._initialise_rows(tensor, first, count)
                continue
            if fill == Fill.TOKEN:
                for offset, block in token_blocks(self.plan, tensor, first, count):
                    self._put(tensor, offset, block)
            elif fill == Fill.MEAN:
                mean = rows.mean(tensor.stored)
                for row in range(first, first + count):
                    self._put(tensor, row * row_bytes, mean)
            # Zeros stay a hole.
            self.advance(count * row_bytes)

    # -- small tensors --------------------------------------------------------------------------

    def _write_new(self, tensor: TensorPlan) -> None:
        fixed = constant(tensor)
        if fixed is not None:
            self._put(tensor, 0, fixed)
        elif tensor.init == "normal":
            self._initialise_rows(tensor, 0, tensor.output.shape[0])
            return
        self.advance(tensor.nbytes)

    def _write_lambda(self, tensor: TensorPlan) -> None:
        assert tensor.source is not None and tensor.lambda_change is not None
        base = tensor.source.removesuffix(tensor.role)
        q1, k1, q2, k2 = (self.plan.checkpoint.read(base + role) for role in LAMBDA_ROLES)
        changed = change_lambda(q1, k1, q2, k2, tensor.lambda_change)
        self.writer.write(tensor.output.name, 0, changed[LAMBDA_ROLES.index(tensor.role)])
        self.advance(tensor.nbytes)

    def _write_vector(self, tensor: TensorPlan) -> None:
        assert tensor.source is not None
        vector = self.plan.checkpoint.read(tensor.source)[None, :]
        if self.finite.claim(tensor.source):
            self.finite.look(tensor.source, vector)
        moves = ColumnMoves(tensor.dims[0])
        grown = moves.apply(vector, self.plan.symmetry, tensor.output.name, 0)
        entries = tensor.dims[0]
        if entries is not None and (new := entries.new(Fill.INIT)).any() and tensor.init != "zeros":
            fill = normal(self.plan, tensor, 0, grown.shape) if tensor.init == "normal" else 1
            grown = np.where(new, fill, grown).astype(grown.dtype)
        if entries is not None and (new := entries.new(Fill.TOKEN)).any():
            grown[:, new] = token_rows(self.plan, tensor).of(np.flatnonzero(new)).T
        scale = entries.element_scale if entries is not None else None
        grown = rescale(grown, tensor.factor, tensor.gain_offset, tensor.stored, columns=scale)
        NewColumns(self.plan, tensor).average(grown)
        self.writer.write(tensor.output.name, 0, grown)
        self.advance(tensor.nbytes)

    def _write_computed(self, tensor: TensorPlan) -> None:
        for offset, block in computed_blocks(self.plan, tensor):
            if self.stop.is_set():
                raise Stopped
            self.writer.write(tensor.output.name, offset, block)
            self.advance(block.nbytes)

    def _write_perturbed(self, tensor: TensorPlan) -> None:
        source = tensor.source
        assert source is not None
        unchecked = self.finite.claim(source, tensor.source_start)

        def look(block: Array) -> None:
            if self.stop.is_set():
                raise Stopped
            if unchecked:
                self.finite.look(source, block)

        for offset, block in warm_blocks(self.plan, tensor, look):
            self._put(tensor, offset, block)
            self.advance(block.nbytes)

    # -- matrices with arithmetic ---------------------------------------------------------------

    def _write_matrix(self, tensor: TensorPlan) -> None:
        """Read blocks of source rows once; write each to all the rows that are made of it."""
        assert tensor.source is not None
        rows, columns = tensor.dims[0], tensor.dims[-1]
        info = self.plan.checkpoint.tensors[tensor.source]
        dtype = DTYPES[info.dtype].numpy
        assert dtype is not None
        old_rows, old_width = info.shape[-2:]
        stored = tensor.stored
        row_bytes = tensor.output.shape[1] * stored.itemsize
        step = block_rows(old_width)
        targets, moves = RowTargets(rows, old_rows), ColumnMoves(columns)
        new_columns, new_rows = NewColumns(self.plan, tensor), NewRows(rows, tensor.output.shape[1])
        redrawn = Redrawn(tensor, self.plan.symmetry.seed) if tensor.redrawn else None
        scales = row_scale(rows, old_rows), columns.element_scale if columns else None
        for position, first, block in self._blocks(tensor, (old_rows, old_width), dtype, step):
            if self.stop.is_set():
                raise Stopped
            block = part_of(block, tensor, self.plan.symmetry, position)
            variants = [block]
            if rows is not None and (rows.shares or rows.perturbed is not None):
                variants = expand_rows(block, rows, first, self.plan.symmetry, tensor.key, position)
            grown = []
            row_factor = None if scales[0] is None else scales[0][first : first + len(block)]
            for part, variant in enumerate(variants):
                moved = moves.apply(variant, self.plan.symmetry, tensor.key, position)
                moved = rescale(
                    moved, tensor.factor, tensor.gain_offset, stored, row_factor, scales[1]
                )
                new_columns.fill(moved, position, part)
                if redrawn is not None:  # no axis of its rows or columns grows in the same plan
                    drawn = self.moments.of(tensor) * tensor.own_factor
                    moved = redrawn.apply(moved, first, position, drawn)
                grown.append(moved)
            for rank, offset, row, count in targets.within(first, first + len(block)):
                written = grown[rank if len(grown) > 1 else 0][offset : offset + count]
                self._put(tensor, row * row_bytes, written)
                new_rows.add(written)
                self.advance(written.nbytes)
        self._write_new_rows(tensor, new_rows)

    def _blocks(
        self, tensor: TensorPlan, shape: tuple[int, int], dtype: np.dtype[Any], step: int
    ) -> Iterator[tuple[int, int, Array]]:
        """(position, first row, block [rows, columns]) of a matrix, through one reused buffer."""
        assert tensor.source is not None
        source, (rows, width) = tensor.source, shape
        if not width:
            return
        load = max(step, INPUT_BYTES // (width * dtype.itemsize) // step * step)
        unchecked = self.finite.claim(source, tensor.source_start)
        buffer = self._buffer(min(load, rows) * width * dtype.itemsize)
        for start in range(0, rows, load):
            height = min(load, rows - start)
            raw = buffer[: height * width * dtype.itemsize]
            offset = tensor.source_start + start * width * dtype.itemsize
            self.plan.checkpoint.read_into(source, raw, offset)
            if unchecked:
                self.finite.look(source, raw)
            loaded = raw.view(dtype).reshape(height, width)
            for first in range(0, height, step):
                yield (start + first) // step, start + first, loaded[first : first + step]

    def _buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        buffer: npt.NDArray[np.uint8] | None = getattr(self.local, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self.local.buffer = np.empty(nbytes, np.uint8)
        return buffer[:nbytes]


def _computes(tensor: TensorPlan) -> bool:
    rows, columns = tensor.dims[0], tensor.dims[-1]
    return columns is not None or (rows is not None and rows.computes)


# By the cheapest way that each allows.
WRITERS: dict[Action, Callable[[_Work, TensorPlan], None]] = {
    Action.COPIED: _Work._copy_rows,
    Action.GROWN: _Work._write_mapped,
    Action.RESCALED: _Work._write_mapped,
    Action.REDRAWN: _Work._write_mapped,
    Action.PERTURBED: _Work._write_perturbed,
    Action.LAMBDA: _Work._write_lambda,
    Action.COMPUTED: _Work._write_computed,
    Action.NEW: _Work._write_new,
    Action.CLOSED: _Work._write_new,
    Action.ZERO: _Work._leave_zero,
}
