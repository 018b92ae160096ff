"""SIGTERM and SIGHUP end a command the way Ctrl-C does: what it was writing is cleaned away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from growkit.core.signals import leave_terminal, stopping_signals


@contextmanager
def terminated_in_order() -> Iterator[None]:
    """Raise SystemExit in the main thread on SIGTERM or SIGHUP, so that every ``finally`` runs.

    Schedulers send SIGTERM some time before SIGKILL; a second one during the cleaning is ignored.
    A command may take the signal over for a while and then gives it back (training does).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        if number != signal.SIGTERM:
            leave_terminal()
        raise SystemExit(128 + number)

    before: dict[int, Any] = {}
    for one in stopping_signals():
        before[one] = signal.signal(one, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
