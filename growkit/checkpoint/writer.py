"""Writes planned shards in any order and from any thread; nothing is held in memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from growkit.checkpoint.layout import INDEX_FILE
from growkit.checkpoint.raw_bytes import byte_view, copy_exactly, write_exactly
from growkit.checkpoint.shards import Place, ShardPlan
from growkit.core.files import COPY_AGAIN
from growkit.errors import CheckpointError, GrowkitError

_FULL = {errno.ENOSPC, errno.EDQUOT}


class ShardWriter:
    """Creates every file of a plan at its final size, header and index first.

    What is never written reads as zero (a hole in the file, which costs no input or output).
    ``write`` and ``copy`` may be called from several threads. Use as a context manager: leaving it
    normally makes the files durable, leaving it by an exception only closes them.

    Args:
        folder: an existing folder.
        plan: from :func:`growkit.checkpoint.plan_shards`.
        create: False for a further writer of files that another one (in another process, say) has
            created by the same plan; each writes ranges of its own.

    Raises:
        GrowkitError: the disk is full (also from ``write``, ``copy`` and ``close``).
        FileExistsError: the folder already has one of the files.
    """

    def __init__(self, folder: Path, plan: ShardPlan, *, create: bool = True) -> None:
        self.folder, self.plan = folder, plan
        self._descriptors: dict[str, int] = {}
        try:
            if not create:
                for shard in plan.shards:
                    self._descriptors[shard.name] = os.open(
                        folder / shard.name, os.O_RDWR | os.O_CLOEXEC
                    )
                return
            for shard in plan.shards:
                self._create(shard.name, shard.header, shard.size)
            if plan.index is not None:
                self._create(INDEX_FILE, plan.index, len(plan.index))
        except BaseException:
            self._release()
            raise

    def _create(self, name: str, content: bytes, size: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = self._descriptors[name] = os.open(self.folder / name, flags, 0o666)
            os.ftruncate(descriptor, size)
            write_exactly(descriptor, memoryview(content), 0)
        except OSError as error:
            raise self._explain(error, name) from error

    def write(self, name: str, offset: int, data: Any) -> None:
        """Write a contiguous buffer or array at byte ``offset`` of the tensor ``name``."""
        view = byte_view(data)
        place = self._place(name, offset, len(view))
        try:
            write_exactly(self._descriptors[place.shard], view, place.start + offset)
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
        target = self._descriptors[place.shard]
        try:
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
            for name, descriptor in self._descriptors.items():
                try:
                    os.fsync(descriptor)
                except OSError as error:
                    raise self._explain(error, name) from error
        finally:
            self._release()

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
            self._release()

    def _place(self, name: str, offset: int, nbytes: int) -> Place:
        place = self.plan.places[name]
        # A write past the end would land silently in the next tensor.
        if offset < 0 or nbytes < 0 or offset + nbytes > place.nbytes:
            raise ValueError(
                f"bytes {offset}..{offset + nbytes} are not inside {name!r} ({place.nbytes})"
            )
        return place

    def _explain(self, error: OSError, shard: str) -> Exception:
        if error.errno in _FULL:
            return GrowkitError(
                f"The disk became full while {shard!r} was written.",
                "Free some space or choose another output folder.",
            )
        if error.errno == errno.EMFILE:
            return GrowkitError(
                f"{len(self.plan.shards)} shards are more files than this process may open.",
                "Give a larger --max-shard-size.",
            )
        return error

    def _release(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
