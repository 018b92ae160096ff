"""``training.torch_compile: auto``: a long run compiles its model where that pays.

The first steps of a run are timed as they are. Where the rest of it would take a quarter of an hour
or more, the next micro-batch goes forward and backward a few times, with and without torch's
compiler, and its gradients are thrown away. Training steps are compiled from there on if that is
faster by a tenth at least. The choice is kept in the run's folder, so that a continued run computes
what an uninterrupted one does, whatever a clock says the second time.

Only training steps are compiled: held-out text, samples and probes have other shapes and hooks.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from growkit.core.writing import write_whole
from growkit.training.parallel.processes import Processes
from growkit.training.recipe import Recipe

FILE = "compiled.json"
TIMED_STEPS = 5  # after the first one
WORTH_SECONDS = 900.0  # what is left of a run; below, a trial costs about what it could save
FASTER = 0.9
ROUNDS = 3


class CompileChoice:
    """Whether, and from which step on, the training steps of a run are compiled.

    Args:
        folder: of the run; ``compiled.json`` in it holds the choice.
        separate: documents of a sequence are kept apart, by calls or masks that differ from batch
            to batch, which a compiler would follow.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        processes: Processes,
        *,
        separate: bool,
        say: Callable[[str], None],
    ) -> None:
        section = recipe.training
        self.recipe, self.file, self.processes, self.say = recipe, folder / FILE, processes, say
        self.undecided = (
            section.torch_compile == "auto"
            and not section.full_determinism
            and section.lora is None
            and not recipe.parallel.sharded
            and recipe.parallel.context == 1
            and not separate
        )
        self.stored = processes.from_first(self._read) if self.undecided else None
        self.compiled: Any = None
        self.steps, self.began = -1, 0.0

    @contextlib.contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Calls of the bare model are compiled, if that was the choice."""
        if self.compiled is None:
            yield
            return
        model._compiled_call_impl = self.compiled
        try:
            yield
        finally:
            model._compiled_call_impl = None

    def before_step(self, model: Any, step: int, trial: Callable[[], Any]) -> float:
        """Choose, when it is time; to be called before the first micro-batch of every step.

        Args:
            model: the bare module.
            step: steps that the run has done.
            trial: passes the micro-batch forward and backward, and forgets its gradients.

        Returns:
            Seconds that trials took.
        """
        if self.stored is not None and step >= self.stored["step"]:
            self.undecided = False
            if self.stored["compiled"]:
                self.compiled = torch.compile(model._call_impl)
                self.say("the training steps are compiled, as they were")
            return 0.0
        self.steps += 1
        if self.steps == 1:
            self.began = time.monotonic()
        if self.stored is not None or self.steps <= TIMED_STEPS:
            return 0.0
        self.undecided = False
        left = (self.recipe.end_step - step) * (time.monotonic() - self.began) / TIMED_STEPS
        long = self.processes.from_first(lambda: left >= WORTH_SECONDS)
        return self._try(model, step, trial) if long else 0.0

    def _try(self, model: Any, step: int, trial: Callable[[], Any]) -> float:
        began = time.monotonic()
        self.say(f"step {step:,}: trying torch's compiler, as torch_compile: auto says")
        found: dict[str, Any] = {"compiled": False, "step": step}
        compiled = torch.compile(model._call_impl)
        times: dict[bool, list[float]] = {True: [], False: []}
        try:
            for number in range(1 + ROUNDS):
                for with_it in (True, False):
                    self.compiled = compiled if with_it else None
                    with self.applied(model):
                        seconds = _timed(trial)
                    if number:  # not the one that compiles
                        times[with_it].append(seconds)
        except Exception as error:  # a compiler that is missing or fails is a reason to go without
            verdict = f"it fails here ({type(error).__name__}); going on without it"
        else:
            fast, slow = statistics.median(times[True]), statistics.median(times[False])
            found |= {"seconds": round(fast, 4), "seconds_not_compiled": round(slow, 4)}
            found["compiled"] = self.processes.from_first(lambda: fast < FASTER * slow)
            going_on = "with" if found["compiled"] else "without"
            verdict = f"{slow / fast:.2f} times as fast; going on {going_on} it"
        self.compiled = compiled if found["compiled"] else None
        seconds = time.monotonic() - began
        found["trial_seconds"] = round(seconds, 1)
        self.say(f"step {step:,}: {verdict} ({seconds:.0f} s of trials)")
        self.processes.from_first(
            lambda: write_whole(self.file, json.dumps(found, indent=1) + "\n")
        )
        return seconds

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            return {"compiled": bool(found["compiled"]), "step": int(found["step"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of it; random numbers are as they were."""
    began = time.monotonic()
    with torch.random.fork_rng():
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - began
