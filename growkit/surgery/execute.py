"""Carry a plan out: stream the source through a few reused buffers into the planned shards.

Unchanged bytes are copied by range, zeros stay holes, and only shared columns are computed, in
blocks that fit the cache. Tensors are independent, so threads change nothing but the time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import DTYPES, ShardWriter
from growkit.surgery.axis_map import NEW
from growkit.surgery.dim_map import DimMap
from growkit.surgery.lambdas import change_lambda
from growkit.surgery.plan import Plan, TensorPlan
from growkit.surgery.symmetry import Symmetry, compute_dtype, random_bits, shares

Array = npt.NDArray[Any]
Advance = Callable[[int], None]

# Fits the second-level cache with its temporaries, yet amortises the numpy calls.
BLOCK_ELEMENTS = 1 << 16
INPUT_BYTES = 4 << 20
COPY_BYTES = 64 << 20


def execute(
    plan: Plan,
    writer: ShardWriter,
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
        threads: workers; default one a core. Memory grows by about 16 MB each.
        advance: called with the number of bytes done, from any thread.
        on_non_finite: called with the name of a computed tensor that holds NaN or infinity.
    """
    done = advance or (lambda count: None)
    work = _Work(plan, writer, done, on_non_finite or (lambda name: None))
    # The largest first, so that no thread is left alone with a large one at the end.
    order = sorted(plan.tensors, key=lambda t: -_nbytes(t))
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        futures = [pool.submit(work.write, tensor) for tensor in order]
        try:
            for future in futures:
                future.result()
        except BaseException:
            work.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class Stopped(Exception):
    """Another thread failed or the user interrupted; this one gives up."""


def _nbytes(tensor: TensorPlan) -> int:
    return int(np.prod(tensor.output.shape)) * DTYPES[tensor.output.dtype].bits // 8


class _Work:
    def __init__(
        self,
        plan: Plan,
        writer: ShardWriter,
        advance: Advance,
        on_non_finite: Callable[[str], None],
    ) -> None:
        self.plan, self.writer, self.advance = plan, writer, advance
        self.on_non_finite = on_non_finite
        self.stop = threading.Event()
        self.local = threading.local()
        self.initializer_range = float(plan.config.get("initializer_range", 0.02))

    def write(self, tensor: TensorPlan) -> None:
        """Write one tensor by the cheapest way that its plan allows."""
        if self.stop.is_set():
            raise Stopped
        if tensor.action == "zero":
            self.advance(_nbytes(tensor))
        elif tensor.action == "closed":
            self._write_closed(tensor)
        elif tensor.source is None:
            self._write_new(tensor)
        elif tensor.lambda_change is not None:
            self._write_lambda(tensor)
        elif len(tensor.output.shape) == 1:
            self._write_vector(tensor)
        elif tensor.factor == 1.0 and tensor.dims[-1] is None and not _shares_rows(tensor):
            self._copy_rows(tensor)
        else:
            self._write_matrix(tensor)

    # -- without arithmetic ---------------------------------------------------------------------

    def _copy_rows(self, tensor: TensorPlan) -> None:
        """Copy runs of whole rows by byte range; new rows start at random (or zero)."""
        assert tensor.source is not None
        info = self.plan.checkpoint.tensors[tensor.source]
        row_bytes = _nbytes(tensor) // tensor.output.shape[0] if tensor.output.shape[0] else 0
        rows = tensor.dims[0]
        runs = rows.runs if rows else ((0, 0, tensor.output.shape[0]),)
        descriptor = self.plan.checkpoint.descriptor(info.shard)
        for old, new, count in runs:
            if old == NEW:
                self._initialise_rows(tensor, new, count)
                continue
            length, start = count * row_bytes, info.start + old * row_bytes
            for offset in range(0, length, COPY_BYTES):
                if self.stop.is_set():
                    raise Stopped
                part = min(COPY_BYTES, length - offset)
                self.writer.copy(
                    tensor.output.name, new * row_bytes + offset, descriptor, start + offset, part
                )
                self.advance(part)

    def _initialise_rows(self, tensor: TensorPlan, first: int, count: int) -> None:
        rows = tensor.dims[0]
        width = int(np.prod(tensor.output.shape[1:]))
        item = DTYPES[tensor.output.dtype].bits // 8
        if rows is None or not rows.consumes:
            step = max(1, BLOCK_ELEMENTS // max(width, 1))
            for row in range(first, first + count, step):
                height = min(step, first + count - row)
                block = self._random(tensor, row, (height, width))
                self.writer.write(tensor.output.name, row * width * item, block)
        self.advance(count * width * item)

    def _random(self, tensor: TensorPlan, position: int, shape: tuple[int, ...]) -> Array:
        """Normal numbers of std ``initializer_range``, keyed by tensor and position."""
        dtype = DTYPES[tensor.output.dtype].numpy
        assert dtype is not None
        seed = int.from_bytes(
            random_bits(self.plan.symmetry.seed, tensor.output.name + "#new", position, 8), "little"
        )
        generator = np.random.Generator(np.random.Philox(seed))
        numbers = generator.standard_normal(shape, dtype=np.float32)
        return (numbers * np.float32(self.initializer_range)).astype(dtype)

    # -- small tensors --------------------------------------------------------------------------

    def _write_new(self, tensor: TensorPlan) -> None:
        dtype = DTYPES[tensor.output.dtype].numpy
        assert dtype is not None
        if tensor.init == "ones":
            self.writer.write(tensor.output.name, 0, np.ones(tensor.output.shape, dtype))
        elif tensor.init == "normal":
            block = self._random(tensor, 0, tensor.output.shape)
            self.writer.write(tensor.output.name, 0, block)
        self.advance(_nbytes(tensor))

    def _write_closed(self, tensor: TensorPlan) -> None:
        """A gain of zero in a norm that adds an offset to what is stored."""
        dtype = DTYPES[tensor.output.dtype].numpy
        assert dtype is not None
        closed = np.full(tensor.output.shape, -tensor.gain_offset).astype(dtype)
        self.writer.write(tensor.output.name, 0, closed)
        self.advance(_nbytes(tensor))

    def _write_lambda(self, tensor: TensorPlan) -> None:
        assert tensor.source is not None and tensor.lambda_change is not None
        base = tensor.source.removesuffix(tensor.role)
        roles = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
        q1, k1, q2, k2 = (self.plan.checkpoint.read(base + role) for role in roles)
        changed = change_lambda(q1, k1, q2, k2, tensor.lambda_change)
        self.writer.write(tensor.output.name, 0, changed[roles.index(tensor.role)])
        self.advance(_nbytes(tensor))

    def _write_vector(self, tensor: TensorPlan) -> None:
        assert tensor.source is not None
        if tensor.dims[0] is None and tensor.factor == 1.0:
            self._copy_rows(tensor)
            return
        vector = self.plan.checkpoint.read(tensor.source)[None, :]
        grown = expand_columns(vector, tensor.dims[0], self.plan.symmetry, tensor.output.name, 0)
        if tensor.dims[0] is not None and not tensor.dims[0].consumes:
            new = np.repeat(tensor.dims[0].source == NEW, tensor.dims[0].block)
            if new.any() and tensor.init != "zeros":
                fill = self._random(tensor, 0, grown.shape) if tensor.init == "normal" else 1
                grown = np.where(new, fill, grown).astype(grown.dtype)
        self.writer.write(tensor.output.name, 0, self._scaled(tensor, grown))
        self.advance(_nbytes(tensor))

    def _scaled(self, tensor: TensorPlan, block: Array) -> Array:
        if tensor.factor != 1.0:
            wide = block.astype(np.float64 if tensor.gain_offset else compute_dtype(block.dtype))
            stored = DTYPES[tensor.output.dtype].numpy  # wider than the source for small gains
            offset = wide.dtype.type(tensor.gain_offset)
            block = ((wide + offset) * wide.dtype.type(tensor.factor) - offset).astype(stored)
        if not np.isfinite(block.astype(np.float32, copy=False).sum()):
            self.on_non_finite(tensor.output.name)
        return block

    # -- matrices with arithmetic ---------------------------------------------------------------

    def _write_matrix(self, tensor: TensorPlan) -> None:
        """Read blocks of source rows once; write each to all the rows that are made of it."""
        assert tensor.source is not None
        rows, columns = tensor.dims[0], tensor.dims[-1]
        if len(tensor.output.shape) != 2:
            raise NotImplementedError("only matrices have shared axes so far")
        info = self.plan.checkpoint.tensors[tensor.source]
        dtype = DTYPES[info.dtype].numpy
        assert dtype is not None
        old_rows, old_width = info.shape
        row_bytes = tensor.output.shape[1] * dtype.itemsize
        step = max(1, BLOCK_ELEMENTS // max(old_width, 1))
        targets = _targets(rows, old_rows)
        for position, first, block in self._blocks(tensor.source, info.shape, dtype, step):
            if self.stop.is_set():
                raise Stopped
            variants = [block]
            if rows is not None and rows.shares:
                variants = _row_variants(
                    block, rows, first, self.plan.symmetry, tensor.output.name, position
                )
            grown = [
                self._scaled(
                    tensor,
                    expand_columns(v, columns, self.plan.symmetry, tensor.output.name, position),
                )
                for v in variants
            ]
            for rank, offset, row, count in targets.within(first, first + len(block)):
                part = grown[rank if len(grown) > 1 else 0][offset : offset + count]
                self.writer.write(tensor.output.name, row * row_bytes, part)
                self.advance(part.nbytes)
        if rows is not None:
            for old, new, count in rows.runs:
                if old == NEW:
                    self._initialise_rows(tensor, new, count)

    def _blocks(
        self, source: str, shape: tuple[int, ...], dtype: np.dtype[Any], step: int
    ) -> Iterator[tuple[int, int, Array]]:
        """(position, first row, block [rows, columns]) of a matrix, through one reused buffer."""
        rows, width = shape
        if not width:
            return
        load = max(step, INPUT_BYTES // (width * dtype.itemsize) // step * step)
        buffer = self._buffer(min(load, rows) * width * dtype.itemsize)
        for start in range(0, rows, load):
            height = min(load, rows - start)
            raw = buffer[: height * width * dtype.itemsize]
            self.plan.checkpoint.read_into(source, raw, start * width * dtype.itemsize)
            loaded = raw.view(dtype).reshape(height, width)
            for first in range(0, height, step):
                yield (start + first) // step, start + first, loaded[first : first + step]

    def _buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        buffer: npt.NDArray[np.uint8] | None = getattr(self.local, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self.local.buffer = np.empty(nbytes, np.uint8)
        return buffer[:nbytes]


def _shares_rows(tensor: TensorPlan) -> bool:
    rows = tensor.dims[0]
    return rows is not None and rows.shares


class _targets:
    """Written rows of each range of old rows: the inverse of a row map, as runs."""

    def __init__(self, rows: DimMap | None, old_rows: int) -> None:
        if rows is None:
            self.runs = [(0, 0, 0, old_rows)]
            return
        self.runs = []
        for rank in range(int(rows.rank.max()) + 1 if len(rows.rank) else 0):
            here = np.flatnonzero((rows.rank == rank) & (rows.source != NEW))
            if not len(here):  # new units are ranked too
                break
            sources = rows.source[here]
            breaks = np.flatnonzero((np.diff(sources) != 1) | (np.diff(here) != 1)) + 1
            for part in np.split(np.arange(len(here)), breaks):
                old, new = int(sources[part[0]]) * rows.block, int(here[part[0]]) * rows.block
                self.runs.append((rank, old, new, len(part) * rows.block))

    def within(self, first: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(rank, offset in the block, written row, rows) for the old rows [first, end)."""
        for rank, old, new, count in self.runs:
            low, high = max(old, first), min(old + count, end)
            if low < high:
                yield rank, low - first, new + low - old, high - low


def expand_columns(
    block: Array, columns: DimMap | None, symmetry: Symmetry, name: str, position: int
) -> Array:
    """Apply a column map to a block [rows, old columns]; new columns are zero.

    Units with several readers are shared by ``symmetry``; producers are copied as they are.
    """
    if columns is None:
        return block
    height = len(block)
    units = block.reshape(height, -1, columns.block)
    grown = np.zeros((height, len(columns.source), columns.block), block.dtype)
    if not columns.consumes:
        known = columns.source != NEW
        grown[:, known] = units[:, columns.source[known]]
        return grown.reshape(height, -1)
    for copies in np.unique(columns.multiplicity[columns.multiplicity > 0]):
        here = columns.multiplicity == copies
        sources = np.unique(columns.source[here])
        whole = len(sources) == units.shape[1]
        picked = units if whole else units[:, sources]
        parts = shares(
            picked.reshape(height, -1), int(copies), symmetry, f"{name}#{copies}", position
        )
        for rank, part in enumerate(parts):
            places = np.flatnonzero(here & (columns.rank == rank))
            ordered = np.searchsorted(sources, columns.source[places])
            values = part.reshape(height, -1, columns.block)
            in_order = bool((ordered == np.arange(len(ordered))).all())
            grown[:, places] = values if in_order else values[:, ordered]
    return grown.reshape(height, -1)


def _row_variants(
    block: Array, rows: DimMap, first: int, symmetry: Symmetry, name: str, position: int
) -> list[Array]:
    """One block for each copy, when rows are read by the copied axis (transposed layouts)."""
    counts = np.zeros(rows.old_width // rows.block, np.int64)
    known = rows.source != NEW
    counts[rows.source[known]] = rows.multiplicity[known]
    per_row = np.repeat(counts, rows.block)[first : first + len(block)]
    variants = [np.zeros_like(block) for _ in range(int(counts.max()))]
    for copies in np.unique(per_row):
        here = per_row == copies
        parts = shares(block[here], int(copies), symmetry, f"{name}#{copies}", position)
        for variant, part in zip(variants, parts, strict=False):
            variant[here] = part
    return variants
