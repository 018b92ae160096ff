"""One process makes a run; it ends when the study that started it is gone. No torch."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# EX_TEMPFAIL of sysexits.h: another process makes this run at the moment.
BUSY = 75


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder to itself for the time being."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.lockf(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def end_with_parent(interval: float = 2.0) -> None:
    """Send this process SIGTERM when its parent is gone (killed, too): nobody waits for it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
