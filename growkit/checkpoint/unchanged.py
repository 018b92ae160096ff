# SPDX-License-Identifier: Apache-2.0
"""Files that must stay the same while they are read: seen before, compared at the end.

A source that is rewritten while it is read would give a mixture of two models. Whoever rewrites a
file changes its size, its time of change or its inode; ctime cannot be set back by any program.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from growkit.core.errors import CheckpointError

_Stamp = tuple[int, int, int, int, int]


class Unchanged:
    """Remembers how files look now; :meth:`check` refuses those that look otherwise later.

    Args:
        folder: whose regular files (not those of its subfolders) are remembered.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._seen: dict[Path, _Stamp] = {}
        if folder is not None:
            with os.scandir(folder) as entries:
                self.add(Path(entry.path) for entry in entries)

    def add(self, paths: Iterable[Path]) -> None:
        """Remember these files too; what is no regular file is passed over."""
        for path in paths:
            stamp = _stamp(path)
            if stamp is not None:
                self._seen[path] = stamp

    def check(self, paths: Iterable[Path] | None = None) -> None:
        """Compare the given files, or all; those that were never remembered are passed over.

        Raises:
            CheckpointError: a file was rewritten, exchanged or removed since.
        """
        for path in self._seen if paths is None else paths:
            if path in self._seen and _stamp(path) != self._seen[path]:
                raise CheckpointError(
                    f"{str(path)!r} changed while it was read, so what was read may be a mixture "
                    "of two saves.",
                    "Run the command again when nothing writes into that folder.",
                )


def _stamp(path: Path) -> _Stamp | None:
    """Size, times of change of content and inode, inode and device; None without such a file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev
