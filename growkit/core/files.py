# SPDX-License-Identifier: Apache-2.0
"""Files of a folder that others made: regular files of bounded size, opened without waiting.

Opening a pipe waits for its other end, a device never ends, and a file may grow while it is read;
so whatever reads a folder opens its files here.

Paths that a user gives for something to be written.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from growkit.core.errors import CheckpointError, GrowkitError, UsageError
from growkit.core.os_errors import about, explained, system_failed

COPY_AGAIN = "Copy or download the file again."
MAX_TEXT_BYTES = 32_000_000
# O_NONBLOCK: opening a pipe returns at once. Windows has neither that nor O_CLOEXEC.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def open_regular(
    path: Path, *, error: type[GrowkitError] = CheckpointError, remedy: str = COPY_AGAIN
) -> BinaryIO:
    """Open a regular file for reading bytes; never waits, whatever lies there.

    Args:
        path: the file; a link to a regular file is one.
        error: the class that is raised.
        remedy: what the message advises.

    Raises:
        GrowkitError: (``error``) the file is missing, not a regular file, or may not be read.
        OSError: the system failed (too many open files, a disk that fails).
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the name
        if system_failed(cause):
            raise  # no fault of the file: not to be taken for a damaged one
        raise error(f"{str(path)!r} cannot be read: {reason(cause)}.", remedy) from cause
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise error(f"{str(path)!r} is not a regular file.", remedy)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def open_lock(path: Path) -> BinaryIO:
    """Open (or make) a file that is only locked, never waiting.

    Raises:
        CheckpointError: what lies there is not a regular file, or it cannot be made.
    """
    remedy = "Remove it: growkit makes a file of that name to lock the folder."
    flags = (_FLAGS & ~os.O_RDONLY) | os.O_RDWR | os.O_CREAT
    try:
        descriptor = os.open(path, flags, 0o666)
    except PermissionError:
        raise
    except OSError as cause:
        if cause.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise
        raise CheckpointError(f"{str(path)!r} is not a regular file.", remedy) from cause
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{str(path)!r} is not a regular file.", remedy)
    return os.fdopen(descriptor, "r+b", buffering=0)


def require_regular(
    path: Path, *, error: type[GrowkitError] = CheckpointError, remedy: str = COPY_AGAIN
) -> Path:
    """``path`` itself, for a library that opens it, once it is known to be a regular file."""
    open_regular(path, error=error, remedy=remedy).close()
    return path


def read_bytes(
    path: Path,
    *,
    limit: int = MAX_TEXT_BYTES,
    error: type[GrowkitError] = CheckpointError,
    remedy: str = COPY_AGAIN,
) -> bytes:
    """The whole content of a regular file of at most ``limit`` bytes.

    Raises:
        GrowkitError: (``error``) as :func:`open_regular`, and for a larger file.
    """
    with open_regular(path, error=error, remedy=remedy) as file, about(path):
        try:
            size = os.fstat(file.fileno()).st_size
            # read() takes all the memory that it is asked for, so it is asked for what there is.
            content = b"" if size > limit else file.read(size + 1)
            if len(content) > size:  # it grew meanwhile, or lies in /proc, which says 0
                content += file.read(limit + 1 - len(content))
        except OSError as cause:
            if system_failed(cause):
                raise
            raise error(f"{str(path)!r} cannot be read: {reason(cause)}.", remedy) from cause
    if size > limit or len(content) > limit:
        raise error(f"{str(path)!r} is larger than {limit} bytes.", remedy)
    return content


def read_text(
    path: Path,
    *,
    limit: int = MAX_TEXT_BYTES,
    error: type[GrowkitError] = CheckpointError,
    remedy: str = COPY_AGAIN,
) -> str:
    """The text of a UTF-8 file of at most ``limit`` bytes; a byte order mark is left out.

    Raises:
        GrowkitError: (``error``) as :func:`read_bytes`, and for what is not UTF-8.
    """
    content = read_bytes(path, limit=limit, error=error, remedy=remedy)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(
            f"{str(path)!r} cannot be read: not UTF-8 text (byte {cause.start}).", remedy
        ) from cause


def reason(error: BaseException) -> str:
    """What the system says about a file, in a few words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def output_path(path: Path) -> Path:
    """The absolute path with links followed; the last parts need not exist.

    Raises:
        UsageError: no system has such a path: it is too long, holds a NUL, or its links lead in a
            circle.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise UsageError(f"The path {text!r} holds a NUL.", "Choose another path.")
    try:
        # The system itself says what it objects to, here before any work is done.
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # the last two are said by whoever writes, with the folder that refuses
    except OSError as error:
        found = explained(error)
        raise UsageError(found.cause, found.remedy) from error
    return Path(os.path.realpath(path))
