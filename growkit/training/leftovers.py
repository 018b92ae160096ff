"""Removing what a killed run left, or what stands where a file or folder of ours belongs."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path


def remove(path: Path) -> None:
    """Remove a folder, a file or a link (not what it points to); nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        with suppress(FileNotFoundError):
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
