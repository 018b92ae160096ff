"""Makes the runs of a study in worker processes, one after another or several at a time, or as jobs
of a cluster (:mod:`growkit.study.cluster`). No torch.

Two studies may share a folder of runs: a run that another process makes at the moment is waited
for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from growkit.core.errors import UsageError
from growkit.core.names import METRICS
from growkit.core.progress import Progress, Reporter
from growkit.core.writing import write_whole
from growkit.study.nodes import Node
from growkit.study.one_run import BUSY
from growkit.study.recipe import Base, Start
from growkit.study.run_records import MODEL, NODE, Records
from growkit.training.metrics import read_metrics

POLL = 0.5
LOG = "log.txt"
# Seconds until a busy run is asked for again, and that an ending one has for its last step.
RETRY = 5.0
ENDING = 60.0


@dataclass(frozen=True)
class Slot:
    """A place where one run can be made: environment variables of its process."""

    environment: dict[str, str]


def slots(devices: Sequence[str], workers: int) -> list[Slot]:
    """``workers`` places on every device; cores are shared out evenly.

    Args:
        devices: ``auto``, ``cpu`` or ``cuda:N``, the N-th of those that CUDA_VISIBLE_DEVICES
            names where it is set.

    Raises:
        UsageError: there is no N-th one.
    """
    count = len(devices) * workers
    threads = str(max((os.cpu_count() or 1) // count, 1))
    threads = os.environ.get("OMP_NUM_THREADS", threads)
    return [
        Slot({"OMP_NUM_THREADS": threads} | _visible(device))
        for device in devices
        for _ in range(workers)
    ]


def _visible(device: str) -> dict[str, str]:
    if device == "auto":
        return {}
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    number = int(device.removeprefix("cuda:"))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return {"CUDA_VISIBLE_DEVICES": str(number)}
    names = [name.strip() for name in named.split(",") if name.strip()]
    if number >= len(names):
        raise UsageError(
            f"There is no device {device!r}: CUDA_VISIBLE_DEVICES is {named!r}.",
            f"Give cuda:0 to cuda:{len(names) - 1}." if names else "Give cpu.",
        )
    return {"CUDA_VISIBLE_DEVICES": names[number]}


@dataclass
class _Running:
    node: Node
    slot: Slot
    process: Any  # subprocess.Popen, or a job that is asked like one
    log: IO[bytes]


class Runner:
    """Starts what can be started until nothing is left.

    Args:
        runs: folder of the runs, one folder a key.
        places: where runs can be made.
        measures, series: of :class:`growkit.study.recipe.StudyRecipe`.
        ended: called after every run that ended well.
        command: of a worker; the folder of the run and our process id are added to it.
        submit: makes a job of a run instead (its folder, its log); what it returns is asked like a
            process.
    """

    def __init__(
        self,
        runs: Path,
        records: Records,
        places: Sequence[Slot],
        reporter: Reporter,
        measures: Sequence[str],
        series: Sequence[str],
        ended: Callable[[], None],
        command: Sequence[str] = (sys.executable, "-m", "growkit.study.one_run"),
        submit: Callable[[Path, IO[bytes]], Any] | None = None,
    ) -> None:
        self.runs, self.records, self.places = runs, records, list(places)
        self.reporter, self.measures, self.series = reporter, list(measures), list(series)
        self.ended, self.command, self.submit = ended, list(command), submit
        self.running: list[_Running] = []
        self.failed: dict[str, str] = {}
        self._busy: dict[str, float] = {}

    def run(self, wanted: Callable[[], list[Node]], total: int) -> None:
        """Make all runs.

        Args:
            wanted: the runs that could be made now, most wanted first; asked again after each.
            total: how many there will be, for the progress bar.
        """
        with self.reporter.progress("runs", total, unit="runs") as bar:
            try:
                while True:
                    if len(self.running) < len(self.places):
                        self._start(wanted())
                    if not self.running and not self._busy:
                        return
                    time.sleep(POLL)
                    self._collect(bar)
            finally:
                self._end()

    def _start(self, nodes: list[Node]) -> None:
        taken = {running.node.key for running in self.running}
        now = time.monotonic()
        waiting = {node.key for node in nodes}
        self._busy = {key: t for key, t in self._busy.items() if key in waiting}
        for node in nodes:
            if len(self.running) == len(self.places):
                return
            later = self._busy.get(node.key, 0.0) > now
            if node.key in taken or node.key in self.failed or later:
                continue
            self._busy.pop(node.key, None)
            self._launch(node)
            taken.add(node.key)

    def _launch(self, node: Node) -> None:
        used = [running.slot for running in self.running]
        slot = next(place for place in self.places if not any(place is other for other in used))
        folder = self.runs / node.key
        folder.mkdir(parents=True, exist_ok=True)
        self._describe(node, folder)
        log = (folder / LOG).open("ab")
        process = self.submit(folder, log) if self.submit else self._process(folder, slot, log)
        self.running.append(_Running(node, slot, process, log))
        self.reporter.log(f"{node.name}: begins, {node.steps:,} steps")

    def _process(self, folder: Path, slot: Slot, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self.command, str(folder), str(os.getpid())],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **slot.environment},
            # Ctrl-C is for the study, which asks its runs to save their last step.
            start_new_session=True,
        )

    def _describe(self, node: Node, folder: Path) -> None:
        start = {name: getattr(node.start, name) for name in Start.model_fields}
        parent = node.start.checkpoint
        if node.parent is not None:
            parent = self.records.trained(node.parent.key)
            assert parent is not None, "a run starts after what it continues from"
        content = {
            "key": node.key,
            "name": node.name,
            "start": Start(**start).model_dump(mode="json", exclude_none=True),
            "parent": None if parent is None else str(parent),
            "recipe": node.recipe,
            "parameters": node.shape.parameters,
            "flops_per_token": node.shape.flops_per_token,
            "measures": [] if isinstance(node.start, Base) else self.measures,
            "series": self.series,
            "has_children": isinstance(node.start, Base),
        }
        write_whole(folder / NODE, json.dumps(content, indent=1) + "\n")

    def _collect(self, bar: Progress) -> None:
        figures = {}
        for running in list(self.running):
            code = running.process.poll()
            if code is None:
                figures[running.node.name] = self._state(running.node)
                continue
            self.running.remove(running)
            running.log.close()
            self._after(running.node, code, bar)
        bar.figures(figures)

    def _after(self, node: Node, code: int, bar: Progress) -> None:
        if code == BUSY:
            self._busy[node.key] = time.monotonic() + RETRY
            return
        record = self.records.get(node.key)
        # A record that is there already is no success: a base may have to be made again.
        if code != 0 or record is None:
            lines = (self.runs / node.key / LOG).read_text(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {code}"
            self.failed[node.key] = reason
            self.reporter.warn(f"{node.name} failed: {reason}")
            return
        bar.advance(1)
        loss = record.diverged or f"held-out loss {record.last_loss:.4f}"
        self.reporter.note(f"{node.name}: {loss}, {record.seconds:,.0f} s of training")
        self.ended()

    def _state(self, node: Node) -> str:
        rows = read_metrics(self.runs / node.key / MODEL / "training" / METRICS)
        if not rows:
            return "starting"
        losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
        loss = f", loss {losses[-1]:.4f}" if losses else ""
        return f"{rows[-1]['step'] - node.first_step} of {node.steps} steps{loss}"

    def _end(self) -> None:
        """Stop what runs: it saves its last step and continues from there the next time."""
        for running in self.running:
            running.process.terminate()
        for running in self.running:
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(ENDING)
            if running.process.poll() is None:
                running.process.kill()
            running.log.close()
        self.running.clear()
