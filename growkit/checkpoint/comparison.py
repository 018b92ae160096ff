# SPDX-License-Identifier: Apache-2.0
"""Takes the place of a ShardWriter: compares what it is given with the files that are there."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

from growkit.checkpoint.layout import INDEX_FILE
from growkit.checkpoint.open_files import OpenFiles
from growkit.checkpoint.raw_bytes import byte_view, read_exactly
from growkit.checkpoint.shards import ShardPlan
from growkit.core import systems

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
