"""SIGTERM ends a command the way Ctrl-C does: what it was writing is cleaned away first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATED = 128 + signal.SIGTERM  # as a shell reports it


@contextmanager
def terminated_in_order() -> Iterator[None]:
    """Raise SystemExit in the main thread on SIGTERM, so that every ``finally`` runs.

    Schedulers send SIGTERM some time before SIGKILL; a second one during the cleaning is ignored.
    A command may take the signal over for a while and then gives it back (training does).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
