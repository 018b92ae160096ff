# SPDX-License-Identifier: Apache-2.0
"""What holds for the whole process: signals that end it, and threads of libraries.

The signals that ask a command to end in order.

How torch's worker threads wait for each other. To be set before torch is imported.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any


def stopping_signals() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP where the system has it and nobody ignores it (nohup does)."""
    found = [signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        found.append(hangup)
    return found


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Ctrl-C and the stopping signals wait until the block is left; for blocks of no length.

    Their handlers raise wherever the main thread is. Between taking a lock and the block that would
    release it (``Thread.start`` waits for the new thread like that), the lock stays taken for good,
    and the thread that wants it keeps the process from ending.
    """
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGINT, *stopping_signals()):
            if (handler := signal.getsignal(one)) is not None:
                before[one] = handler
                signal.signal(one, note)
    try:
        yield
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)
        for signalled in arrived[:1]:
            signal.raise_signal(signalled)


def leave_terminal() -> None:
    """After a hangup: a terminal that is gone answers every write with an error; write nowhere."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            if os.isatty(descriptor):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)


def wait_passively() -> None:
    """Let OpenMP threads sleep while they wait, unless the user chose otherwise.

    By default they spin, and on a machine whose cores are shared the spinning thread keeps the one
    it waits for from running: a step of the demo took 0.7 to 1.6 s with two spinning threads and
    0.2 s with two sleeping ones (or with one thread), on two busy cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def available_cores() -> int:
    """The cores that this process may use: of the machine, by its affinity and by its container."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(cores, 1)
