"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


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
