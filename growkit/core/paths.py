# SPDX-License-Identifier: Apache-2.0
"""Paths that a user gives for something to be written."""

from __future__ import annotations

import os
from pathlib import Path

from growkit.core.errors import UsageError
from growkit.core.os_errors import explained


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
