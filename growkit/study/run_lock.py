"""One process makes a run; it ends when the study that started it is gone. No torch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from growkit.core.files import open_lock
from growkit.core.systems import lock_record

# EX_TEMPFAIL of sysexits.h: another process makes this run at the moment.
BUSY = 75


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder to itself for the time being.

    On a file system without locks everybody has it: two studies must not share such a folder.
    """
    with open_lock(folder / ".lock") as file:
        yield lock_record(file.fileno())


def end_with_parent(parent: int, interval: float = 2.0) -> None:
    """Send this process SIGTERM when its parent is gone (killed, too): nobody waits for it.

    Args:
        parent: process id; the parent says it, for it may be gone before it is asked.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
