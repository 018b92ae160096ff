"""Positional reads and writes that finish: system calls may transfer less than was asked, or be
interrupted (Python repeats what a signal stopped, some network file systems say so by themselves).
"""

from __future__ import annotations

import errno
import os
import threading
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
