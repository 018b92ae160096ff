"""A second process that imports, makes one call, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from growkit.core import worker
from growkit.core.errors import GrowkitError, VerificationFailed
from growkit.core.progress import SilentProgress
from growkit.core.worker import Worker

# Functions for the worker, in a module that only sys.path leads to.
FUNCTIONS = """
import os, sys
from growkit.core.errors import VerificationFailed

def add(a, b, progress):
    print("printed by a library")
    progress.describe("adding")
    progress.advance(2.5)
    return {"sum": a + b, "pid": os.getpid(), "imported": "colorsys" in sys.modules}

def fail(progress):
    raise VerificationFailed("It is wrong.", "Mend it.")

def unreadable(progress):
    class Own(Exception):
        pass
    raise Own("of this function")

def leave(progress):
    os._exit(7)
"""


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "called_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(worker, "available_cores", lambda: 2)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)


class Seen(SilentProgress):
    def __init__(self) -> None:
        self.said: list[Any] = []

    def advance(self, amount: float) -> None:
        self.said.append(amount)

    def describe(self, text: str) -> None:
        self.said.append(text)


def test_another_process_imports_and_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    with Worker("colorsys") as other:
        found = other.call("called_functions:add", {"a": 2, "b": 3}, seen)
    assert (found["sum"], found["imported"]) == (5, True)
    assert found["pid"] != os.getpid()
    assert seen.said == ["adding", 2.5]


@pytest.mark.parametrize("why", ["loaded", "one core", "not wanted"])
def test_this_process_calls_where_nothing_is_gained(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "one core":
        monkeypatch.setattr(worker, "available_cores", lambda: 1)
    with Worker("os" if why == "loaded" else "colorsys", wanted=why != "not wanted") as here:
        found = here.call("called_functions:add", {"a": 2, "b": 3})
    assert (found["sum"], found["pid"]) == (5, os.getpid())


def test_errors_of_the_other_process_are_raised_here() -> None:
    with Worker("colorsys") as other, pytest.raises(VerificationFailed) as failed:
        other.call("called_functions:fail", {})
    assert (failed.value.cause, failed.value.remedy) == ("It is wrong.", "Mend it.")
    assert "called_functions.py" in str(failed.value.__cause__)
    with Worker("colorsys") as other, pytest.raises(RuntimeError, match="Own: of this function"):
        other.call("called_functions:unreadable", {})
    with Worker("colorsys") as other, pytest.raises(GrowkitError, match="exit code 7"):
        other.call("called_functions:leave", {})


def test_modules_in_the_working_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a checkpoint that a stranger made."""
    hostile = tmp_path / "checkpoint"
    hostile.mkdir()
    for name in ("colorsys", "pickle", "queue", "json", "growkit"):
        (hostile / f"{name}.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.chdir(hostile)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    with Worker("colorsys") as other:
        assert other.call("called_functions:add", {"a": 1, "b": 1})["sum"] == 2
    assert not (hostile / "ran").exists()


def test_leaving_the_block_ends_the_process() -> None:
    with pytest.raises(KeyboardInterrupt), Worker("colorsys") as other:
        process = other._process
        assert process is not None and process.poll() is None
        raise KeyboardInterrupt
    assert process.poll() is not None


def test_a_worker_ends_with_the_process_that_made_it(tmp_path: Path) -> None:
    """Even where that one is killed and can clean nothing away."""
    code = (
        "import time\nfrom growkit.core import worker\nworker.available_cores = lambda: 2\n"
        "print(worker.Worker('colorsys')._process.pid, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        pid = int(maker.stdout.readline())
        os.kill(pid, 0)
        maker.kill()
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.is_file() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z")


@pytest.mark.parametrize(("cores", "threads"), [(1, 2), (2, 4), (4, 8), (8, 12), (64, 68)])
def test_threads_follow_the_cores_that_may_be_used(
    cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from growkit.surgery import execute

    monkeypatch.setattr(execute, "available_cores", lambda: cores)
    assert execute.usual_threads() == threads


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_cores_are_those_of_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        from growkit.core.process import available_cores

        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
