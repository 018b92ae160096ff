# SPDX-License-Identifier: Apache-2.0
"""Small files written so that an error names them."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
