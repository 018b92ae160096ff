# SPDX-License-Identifier: Apache-2.0
"""What differs between Linux, macOS and Windows: locks, folders as files, flags, positional I/O.

Locks belong to an open file and end with the process, killed or not; nothing is left behind. Where
the system has no such locks, everybody gets one.
"""

from __future__ import annotations

import errno
import importlib
import os
import threading
from pathlib import Path
from typing import Any


def _module(name: str) -> Any:
    """A module of some systems only; None on the others."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


fcntl: Any = _module("fcntl")  # Linux, macOS
msvcrt: Any = _module("msvcrt")  # Windows

# For every descriptor: closed in child processes; bytes as they are on Windows.
PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
FOLDERS_CAN_BE_OPENED = hasattr(os, "O_DIRECTORY")
_NO_LOCKS_HERE = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL}
_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_position = threading.Lock()


def lock_record(descriptor: int) -> bool:
    """Lock a file opened for writing; False if another process has it.

    The lock is this process's alone: children that outlive it (data loaders) do not hold it.

    Raises:
        OSError: the lock cannot be had for another reason than these.
    """
    return _lock(descriptor, inherited=False)


def lock_open_file(descriptor: int) -> bool:
    """Lock an open file or folder (:func:`open_folder`); False if it is locked by another opening.

    Raises:
        OSError: the lock cannot be had for another reason than these.
    """
    return _lock(descriptor, inherited=True)


def _lock(descriptor: int, *, inherited: bool) -> bool:
    try:
        if fcntl is not None:
            call = fcntl.flock if inherited else fcntl.lockf
            call(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS_HERE:  # some network file systems have no locks
            raise
    return True


def open_folder(folder: Path, *, follow: bool = False) -> int:
    """A descriptor to lock a folder by; closing it gives the lock back.

    Where folders cannot be opened (Windows) it is that of a file beside the folder, which the
    system removes when it is closed.

    Raises:
        OSError: no such folder, or (not ``follow``) a link.
    """
    if FOLDERS_CAN_BE_OPENED:
        nofollow = 0 if follow else os.O_NOFOLLOW
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | nofollow | PLAIN)
    if not folder.is_dir() or (folder.is_symlink() and not follow):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_TEMPORARY", 0) | PLAIN
    return os.open(folder.with_name(f"{folder.name}.lock"), flags)


def is_opened_as(folder: Path, descriptor: int) -> bool:
    """Whether ``folder`` is still what :func:`open_folder` opened."""
    if not FOLDERS_CAN_BE_OPENED:
        return folder.is_dir()
    try:
        return os.path.samestat(os.stat(folder, follow_symlinks=False), os.fstat(descriptor))
    except OSError:
        return False


def sync_path(path: Path) -> None:
    """fsync a file or a folder; a folder only where the system can (not Windows)."""
    flags = os.O_RDONLY
    if not FOLDERS_CAN_BE_OPENED:
        if path.is_dir():
            return
        flags = os.O_RDWR  # Windows syncs what is open for writing
    descriptor = os.open(path, flags | PLAIN)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_at(descriptor: int, view: memoryview, offset: int) -> int:
    """Read into ``view`` from byte ``offset``; how many bytes, 0 at the end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    with _position:  # Windows: two calls that no other thread may come between
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(view))
    view[: len(data)] = data
    return len(data)


def write_at(descriptor: int, view: memoryview, offset: int) -> int:
    """Write ``view`` at byte ``offset``; how many bytes were written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, view, offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, view)
