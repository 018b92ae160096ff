# SPDX-License-Identifier: Apache-2.0
"""A bounded number of open files: opened when they are needed, the longest unused closed first."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_UNKNOWN_LIMIT = 512  # of the C library on Windows


def affordable_files() -> int:
    """How many files one reader or writer keeps open: a quarter of what the process may have.

    There are a source and a target, and the optimizer state's; the rest is for everybody else.
    """
    try:
        import resource
    except ImportError:
        soft = _UNKNOWN_LIMIT
    else:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if soft == resource.RLIM_INFINITY:
            soft = 1 << 16
    return max(soft // 4, 2)


@dataclass
class _File:
    descriptor: int
    users: int = 0


class OpenFiles:
    """Descriptors by name, for several threads.

    One that is in use is never closed, so there may for a moment be more of them than the limit:
    one a thread.

    Args:
        open_file: opens the file of that name.
        before_closing: called with name and descriptor when a file has to make room (not by
            :meth:`close`).
        limit: how many may be open; default :func:`affordable_files`.
    """

    def __init__(
        self,
        open_file: Callable[[str], int],
        before_closing: Callable[[str, int], None] = lambda name, descriptor: None,
        limit: int | None = None,
    ) -> None:
        self._open, self._before_closing = open_file, before_closing
        self.limit = limit or affordable_files()
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, name: str) -> Iterator[int]:
        """The descriptor of a file, open until the end of ``with``."""
        with self._lock:
            file = self._find(name)
            file.users += 1
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.users -= 1

    def pin(self, name: str) -> int:
        """The descriptor of a file, open until :meth:`close`."""
        with self._lock:
            file = self._find(name)
            file.users += 1
            return file.descriptor

    def _find(self, name: str) -> _File:
        file = self._files.get(name)
        if file is None:
            while len(self._files) >= self.limit and self._close_one():
                pass
            file = self._files[name] = _File(self._open_somehow(name))
        self._files.move_to_end(name)
        return file

    def _open_somehow(self, name: str) -> int:
        while True:
            try:
                return self._open(name)
            except OSError as error:
                # The limit may be lower than it was, or others hold most of it.
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._close_one():
                    raise

    def _close_one(self) -> bool:
        """Close the longest unused file; False when all are in use."""
        for name, file in self._files.items():
            if not file.users:
                self._before_closing(name, file.descriptor)
                del self._files[name]
                os.close(file.descriptor)
                return True
        return False

    def close(self) -> None:
        """Close all of them; a later use opens its file again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1].descriptor)
