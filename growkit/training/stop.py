"""SIGTERM and SIGHUP: finish the step, save a checkpoint, end; the same command continues.

A terminal that is closed sends SIGHUP (unless it is ignored, as under nohup).
Schedulers send SIGTERM before they take a machine away (Slurm's ``--signal=TERM@120``, Kubernetes,
spot instances), and torchrun passes it on to its processes. They get it at different moments, so
all of them agree after every step whether to stop.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from growkit.core.process import leave_terminal, stopping_signals
from growkit.training.parallel.processes import Processes


class StopOnSignal(TrainerCallback):
    """Context manager that listens, and callback that stops the training at the end of a step.

    Put it after the callback that asks for a log line at every save: a stop writes none, so that
    the log lines are those of the uninterrupted run.

    Attributes:
        stopped: whether the training was stopped.
        signal: the last one that asked for it (in another process it may be another one).
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.asked = self.stopped = False
        self.signal = signal.SIGTERM
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        # Elsewhere than in the main thread, Python allows no handler.
        if threading.current_thread() is threading.main_thread():
            for number in stopping_signals():
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # Again and again is the same wish: a scheduler and torchrun may both send it.
        self.asked, self.signal = True, signal.Signals(number)
        if number != signal.SIGTERM:
            leave_terminal()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.processes.any(self.asked):
            self.stopped = control.should_save = control.should_training_stop = True
        return control
