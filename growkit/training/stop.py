"""SIGTERM: finish the step, save a checkpoint, end; the same command goes on.

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

from growkit.training.processes import Processes


class StopOnSignal(TrainerCallback):
    """Context manager that listens, and callback that stops the training at the end of a step.

    Put it after the callback that asks for a log line at every save: a stop writes none, so that
    the log lines are those of the uninterrupted run.

    Attributes:
        stopped: whether the training was stopped.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.asked = self.stopped = False
        self._before: Any = None

    def __enter__(self) -> StopOnSignal:
        # Elsewhere than in the main thread, Python allows no handler.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # Again and again is the same wish: a scheduler and torchrun may both send it.
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.processes.any(self.asked):
            self.stopped = control.should_save = control.should_training_stop = True
        return control
