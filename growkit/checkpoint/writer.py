"""Writes planned shards in any order and from any thread; nothing is held in memory.

Takes the place of a ShardWriter: compares what it is given with the files that are there.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

from growkit.checkpoint.layout import INDEX_FILE
from growkit.checkpoint.reading import (
    OpenFiles,
    byte_view,
    copy_exactly,
    read_exactly,
    write_exactly,
)
from growkit.checkpoint.shards import Place, ShardPlan
from growkit.core import systems
from growkit.core.errors import CheckpointError
from growkit.core.files import COPY_AGAIN
from growkit.core.os_errors import explained


class ShardWriter:
    """Creates every file of a plan at its final size, header and index first.

    What is never written reads as zero (a hole in the file, which costs no input or output).
    ``write`` and ``copy`` may be called from several threads. Use as a context manager: leaving it
    normally makes the files durable, leaving it by an exception only closes them. No more files
    are open than the process can afford, however many the plan has.

    Args:
        folder: an existing folder.
        plan: from :func:`growkit.checkpoint.plan_shards`.
        create: False for a further writer of files that another one (in another process, say) has
            created by the same plan; each writes ranges of its own.

    Raises:
        GrowkitError: the disk is full or fails (also from ``write``, ``copy`` and ``close``).
        FileExistsError: the folder already has one of the files.
    """

    def __init__(self, folder: Path, plan: ShardPlan, *, create: bool = True) -> None:
        self.folder, self.plan = folder, plan
        self._files = OpenFiles(self._open, self._make_room_for_another)
        names = [shard.name for shard in plan.shards]
        self._created = set() if create else set(names)
        self._pending = set(names)  # not durable yet
        self._written: set[str] = set()  # of those, the ones that hold more than a header
        if not create:
            return
        try:
            for shard in plan.shards:
                self._create(shard.name, shard.header, shard.size)
            if plan.index is not None:
                self._pending.add(INDEX_FILE)
                self._create(INDEX_FILE, plan.index, len(plan.index))
        except BaseException:
            self._files.close()
            raise

    @property
    def many_files(self) -> bool:
        """Whether not all files stay open: then it is faster to write one after the other."""
        return len(self.plan.shards) >= self._files.limit

    def _create(self, name: str, content: bytes, size: int) -> None:
        try:
            with self._files.use(name) as descriptor:
                os.ftruncate(descriptor, size)
                write_exactly(descriptor, memoryview(content), 0)
        except OSError as error:
            raise self._explain(error, name) from error

    def _open(self, name: str) -> int:
        new = 0 if name in self._created else os.O_CREAT | os.O_EXCL
        flags = os.O_RDWR | new | systems.PLAIN
        descriptor = os.open(self.folder / name, flags, 0o666)
        self._created.add(name)
        return descriptor

    def _make_room_for_another(self, name: str, descriptor: int) -> None:
        """A written file is made durable first: a later descriptor might not hear of its errors."""
        if name in self._written:
            os.fsync(descriptor)
            self._written.discard(name)
            self._pending.discard(name)

    def write(self, name: str, offset: int, data: Any) -> None:
        """Write a contiguous buffer or array at byte ``offset`` of the tensor ``name``."""
        view = byte_view(data)
        place = self._place(name, offset, len(view))
        try:
            with self._files.use(place.shard) as target:
                self._changes(place.shard)
                write_exactly(target, view, place.start + offset)
        except OSError as error:
            raise self._explain(error, place.shard) from error

    def copy(self, name: str, offset: int, source_fd: int, source_offset: int, nbytes: int) -> None:
        """Copy ``nbytes`` of a file to byte ``offset`` of the tensor, in the kernel if possible.

        Args:
            name: the output tensor.
            offset: first byte, counted from the start of the output tensor.
            source_fd: descriptor of the source file (see ``Checkpoint.descriptor``).
            source_offset: absolute byte offset in the source file.
            nbytes: length of the range.
        """
        place = self._place(name, offset, nbytes)
        try:
            with self._files.use(place.shard) as target:
                self._changes(place.shard)
                copy_exactly(source_fd, source_offset, target, place.start + offset, nbytes)
        except EOFError as error:
            raise CheckpointError(
                f"The source of tensor {name!r} became shorter while it was read.", COPY_AGAIN
            ) from error
        except OSError as error:
            raise self._explain(error, place.shard) from error

    def close(self) -> None:
        """Make every file durable (fsync), then close it. A second call does nothing."""
        try:
            for name in sorted(self._pending):
                try:
                    with self._files.use(name) as descriptor:
                        os.fsync(descriptor)
                except OSError as error:
                    raise self._explain(error, name) from error
            self._pending.clear()
        finally:
            self._files.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._files.close()

    def _changes(self, shard: str) -> None:
        if shard not in self._written:
            self._pending.add(shard)
            self._written.add(shard)

    def _place(self, name: str, offset: int, nbytes: int) -> Place:
        place = self.plan.places[name]
        # A write past the end would land silently in the next tensor.
        if offset < 0 or nbytes < 0 or offset + nbytes > place.nbytes:
            raise ValueError(
                f"bytes {offset}..{offset + nbytes} are not inside {name!r} ({place.nbytes})"
            )
        return place

    def _explain(self, error: OSError, shard: str) -> Exception:
        if isinstance(error, FileExistsError):
            return error
        if error.filename is None:
            error.filename = shard
        return explained(error)


_PART = 1 << 20


class DifferentError(Exception):
    """A file is missing, or a byte of it is not what it was compared with."""


class ShardComparison:
    """Compares what a :class:`ShardWriter` of the same plan would have written; writes nothing.

    Sizes, headers and index are compared at once; what is never given is not looked at.

    Raises:
        DifferentError: at the first difference, from every method.
    """

    def __init__(self, folder: Path, plan: ShardPlan) -> None:
        self.folder, self.plan = folder, plan
        self._files = OpenFiles(self._open)
        for shard in plan.shards:
            path = folder / shard.name
            if not path.is_file() or path.stat().st_size != shard.size:
                raise DifferentError(shard.name)
            self._compare(shard.name, memoryview(shard.header), 0)
        if plan.index is not None:
            path = folder / INDEX_FILE
            if not path.is_file() or path.stat().st_size != len(plan.index):
                raise DifferentError(INDEX_FILE)
            self._compare(INDEX_FILE, memoryview(plan.index), 0)

    @property
    def many_files(self) -> bool:
        """As of a :class:`ShardWriter`."""
        return len(self.plan.shards) >= self._files.limit

    def _open(self, name: str) -> int:
        return os.open(self.folder / name, os.O_RDONLY | systems.PLAIN)

    def _compare(self, name: str, wanted: memoryview, start: int) -> None:
        with self._files.use(name) as descriptor:
            there = memoryview(bytearray(min(len(wanted), _PART)))
            for first in range(0, len(wanted), _PART):
                part = wanted[first : first + _PART]
                if read_exactly(descriptor, there[: len(part)], start + first) != len(part):
                    raise DifferentError(name)
                if there[: len(part)] != part:
                    raise DifferentError(name)

    def write(self, name: str, offset: int, data: Any) -> None:
        """Compare with byte ``offset`` on of a tensor."""
        place = self.plan.places[name]
        self._compare(place.shard, byte_view(data), place.start + offset)

    def copy(self, name: str, offset: int, source_fd: int, source_offset: int, nbytes: int) -> None:
        """Compare a range of a file with byte ``offset`` on of a tensor."""
        part = memoryview(bytearray(min(nbytes, _PART)))
        for first in range(0, nbytes, _PART):
            count = min(_PART, nbytes - first)
            if read_exactly(source_fd, part[:count], source_offset + first) != count:
                raise DifferentError(name)
            self.write(name, offset + first, part[:count])

    def __enter__(self) -> ShardComparison:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()
