# SPDX-License-Identifier: Apache-2.0
"""The signals that ask a command to end in order."""

from __future__ import annotations

import os
import signal
from contextlib import suppress


def stopping_signals() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP where the system has it and nobody ignores it (nohup does)."""
    found = [signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        found.append(hangup)
    return found


def leave_terminal() -> None:
    """After a hangup: a terminal that is gone answers every write with an error; write nowhere."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            if os.isatty(descriptor):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)
