# SPDX-License-Identifier: Apache-2.0
"""Files are written whole: synced as they are, or beside their name and renamed.

Small files written so that an error names them.

Files and folders that are there whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from growkit.core.os_errors import about

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_FLAGS |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8.

    Raises:
        OSError: with the path, also where the disk becomes full or fails (see
            :func:`growkit.core.os_errors.explained`).
    """
    write_blocks(path, [content.encode("utf-8") if isinstance(content, str) else content])


def write_blocks(path: Path, blocks: Iterable[bytes]) -> None:
    """Write a whole file block by block; errors as of :func:`write_file`."""
    descriptor = os.open(path, _FLAGS, 0o666)
    try:
        for block in blocks:
            data = memoryview(block)
            with about(path):
                while data:
                    try:
                        data = data[os.write(descriptor, data) :]
                    except InterruptedError:
                        continue
    finally:
        os.close(descriptor)


def write_whole(target: Path, content: str | bytes) -> Path:
    """Write beside ``target`` and rename: after a kill the old file or the new one is there."""
    partial = target.with_name(target.name + ".partial")
    if partial.is_symlink() or not (partial.is_file() or partial.is_dir()):
        partial.unlink(missing_ok=True)  # writing into a pipe would wait
    partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(partial, target)
    return target


def make_whole(target: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder beside ``target`` and rename it; one that is there stays as it is.

    Several processes may do so at once where all of them make the same: the first one wins.
    """
    if target.is_dir():
        return target
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        make(partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
