"""Positional reads: buffers filled exactly, and as many open files as the process affords.

Positional reads and writes that finish: system calls may transfer less than was asked, or be
interrupted (Python repeats what a signal stopped, some network file systems say so by themselves).

A bounded number of open files: opened when they are needed, the longest unused closed first.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit.core.systems import read_at, write_at

# What copy_file_range answers where it cannot do the job although plain reads and writes can.
_NOT_SUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}
_COPY_BUFFER_BYTES = 4 << 20
_LARGEST_CALL = 1 << 30  # Linux transfers at most 2 GiB a call
_thread = threading.local()


def byte_view(data: Any) -> memoryview:
    """The bytes of a contiguous buffer or array, without a copy (ml_dtypes arrays included)."""
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:
            raise ValueError("the array is not contiguous")
        data = data.reshape(-1).view(np.uint8)
    view = memoryview(data)
    # An empty view of several dimensions cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def read_exactly(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` from byte ``offset`` of the file; fewer bytes only at the end of the file."""
    done = 0
    while done < len(view):
        try:
            count = read_at(descriptor, view[done : done + _LARGEST_CALL], offset + done)
        except InterruptedError:
            continue
        if count == 0:
            break
        done += count
    return done


def write_exactly(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of ``view`` at byte ``offset`` of the file."""
    done = 0
    while done < len(view):
        try:
            count = write_at(descriptor, view[done : done + _LARGEST_CALL], offset + done)
        except InterruptedError:
            continue
        if count == 0:  # no system should; asking again for ever would help nobody
            raise OSError(errno.EIO, "nothing was written")
        done += count


def copy_exactly(
    source: int, source_offset: int, target: int, target_offset: int, nbytes: int
) -> None:
    """Copy a byte range between two files, inside the kernel where it can.

    Raises:
        EOFError: the source ends before the range does.
    """
    done = _copy_in_kernel(source, source_offset, target, target_offset, nbytes)
    buffer = _thread_buffer() if done < nbytes else memoryview(b"")
    while done < nbytes:
        part = buffer[: min(len(buffer), nbytes - done)]
        if read_exactly(source, part, source_offset + done) != len(part):
            raise EOFError(f"the source ends before byte {source_offset + nbytes}")
        write_exactly(target, part, target_offset + done)
        done += len(part)


def _copy_in_kernel(
    source: int, source_offset: int, target: int, target_offset: int, nbytes: int
) -> int:
    """Bytes that copy_file_range copied; the rest is for the caller."""
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < nbytes:
        try:
            count = os.copy_file_range(
                source,
                target,
                min(nbytes - done, _LARGEST_CALL),
                source_offset + done,
                target_offset + done,
            )
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno in _NOT_SUPPORTED:
                break
            raise
        if count == 0:  # end of the source; some file systems also answer 0 for no reason
            break
        done += count
    return done


def _thread_buffer() -> memoryview:
    """One reused buffer a thread: fresh memory for every copy costs more than the disk."""
    if not hasattr(_thread, "buffer"):
        _thread.buffer = memoryview(bytearray(_COPY_BUFFER_BYTES))
    buffer: memoryview = _thread.buffer
    return buffer


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
