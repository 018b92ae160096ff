"""Worker processes: order, what fails, what is busy, how they end. A stand-in does the work."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_studies import keep, opened, pretend_trained, record_of, study_of

from growkit.core.progress import Silent
from growkit.study import runner as runner_module
from growkit.study.one_run import held
from growkit.study.runner import Runner, slots
from growkit.study.selection import choose
from growkit.study.study import Study

WORKER = """
import json, os, sys, time
from pathlib import Path
folder, parent = Path(sys.argv[1]), int(sys.argv[2])
node = json.loads((folder / "node.json").read_text())
with open(os.environ["RUNS_LOG"], "a") as log:
    log.write(node["name"] + "\\n")
told = json.loads(os.environ["TOLD"]).get(node["name"])
assert parent == os.getppid()
if told == "sleep":
    time.sleep(60)
if told == "meet":
    hall = Path(os.environ["RUNS_LOG"] + "-hall")
    hall.mkdir(exist_ok=True)
    (hall / str(os.getpid())).touch()
    for _ in range(1200):
        if len(os.listdir(hall)) == 2:
            break
        time.sleep(0.05)
    else:
        sys.exit("nobody came")
if told == "busy" and not (folder / "was-busy").exists():
    (folder / "was-busy").touch()
    sys.exit(75)
if told == "fail":
    print("working", flush=True)
    sys.exit("OutOfMemory: 3 GiB")
record = dict(
    format=1, key=node["key"], name=node["name"], change=None, exactness=None,
    parameters=node["parameters"], flops_per_token=node["flops_per_token"], steps=1, tokens=64,
    learning_rate=1e-2, seconds=1.0, curve=[[0, 5.0], [64, 3.0]], measures={}, series={},
    machine={}, date="2026", diverged="The loss is nan." if told == "diverge" else None,
)
checkpoint = folder / "model" / "training" / "checkpoints" / "checkpoint-6"
checkpoint.mkdir(parents=True, exist_ok=True)
(folder / "model" / "config.json").write_text("{}")
(folder / "record.json").write_text(json.dumps(record))
"""


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    warn = note


class Stand:
    """A study whose runs are made by the worker above."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log, self.heard, self.worker = folder / "log", Heard(), folder / "worker.py"
        self.worker.write_text(WORKER)
        self.study = opened(folder / "study", study_of(**changes))
        monkeypatch.setenv("RUNS_LOG", str(self.log))
        monkeypatch.setattr(runner_module, "POLL", 0.02)
        self.monkeypatch = monkeypatch

    def run(self, workers: int = 1, told: dict[str, str] | None = None) -> list[str]:
        """The names of the runs that were started, in order."""
        self.monkeypatch.setenv("TOLD", json.dumps(told or {}))
        self.log.write_text("")
        self.runner = self.made(self.study, workers)
        self.study.failed = self.runner.failed
        choice = choose(self.study.recipe)
        self.runner.run(lambda: self.study.wanted(choice), 9)
        return self.log.read_text().splitlines()

    def made(self, study: Study, workers: int) -> Runner:
        return Runner(
            study.runs, study.records, slots(["auto"], workers), self.heard, [], [], lambda: None,
            command=(sys.executable, "-S", str(self.worker)),
        )  # fmt: skip


ORDER = ["small, seed 0", "on, seed 0", "signal, seed 0", "scratch, seed 0"]


def test_all_arms_of_a_seed_come_before_the_next_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(tmp_path, monkeypatch, seeds=[0, 1])
    # "scratch" waits for nothing, and yet its turn comes.
    assert stand.run() == ["small, seed 0", *ORDER[1:], *(n.replace("0", "1") for n in ORDER)]
    assert stand.run() == []
    assert [len(arm.runs) for arm in stand.study.result().arms] == [2, 2, 2]


def test_two_places_are_both_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(tmp_path, monkeypatch)
    # Each of the two ends only when the other is at work at the same time.
    started = stand.run(workers=2, told={ORDER[0]: "meet", ORDER[3]: "meet"})
    assert sorted(started) == sorted(ORDER) and not stand.runner.failed


def test_a_run_that_fails_does_not_stop_the_others_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(tmp_path, monkeypatch)
    assert stand.run(told={"on, seed 0": "fail"}) == ORDER
    assert "on, seed 0 failed: OutOfMemory: 3 GiB" in stand.heard.said
    arms = {arm.name: arm for arm in stand.study.result().arms}
    assert arms["on"].failed == {0: "OutOfMemory: 3 GiB"} and not arms["on"].runs
    assert len(arms["signal"].runs) == 1
    assert stand.run() == ["on, seed 0"] and not stand.runner.failed


def test_what_goes_on_from_a_failed_run_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (told, why) in enumerate((("fail", "failed"), ("diverge", "diverged: The loss"))):
        stand = Stand(tmp_path / str(number), monkeypatch)
        assert stand.run(told={"small, seed 0": told}) == ["small, seed 0", "scratch, seed 0"]
        arms = {arm.name: arm for arm in stand.study.result().arms}
        assert arms["signal"].failed[0].startswith(f"small, seed 0 {why}")
        assert len(arms["scratch"].runs) == 1


def test_a_sweep_that_diverged_or_failed_stops_its_arm_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {
        "on": {"base": "small"},
        "scratch": {"shape_of": "on", "training": {"learning_rate": [0.1, 0.2]}},
    }
    trials = [f"scratch, seed 0, learning rate {rate}" for rate in (0.1, 0.2)]
    for number, (told, why) in enumerate(
        (
            ("diverge", "Every learning rate of 'scratch' diverged"),
            ("fail", f"{trials[0]} failed: "),
        )
    ):
        stand = Stand(tmp_path / str(number), monkeypatch, arms=arms)
        started = stand.run(told=dict.fromkeys(trials, told))
        assert sorted(started) == sorted(["small, seed 0", "on, seed 0", *trials])
        on, scratch = stand.study.result().arms
        assert len(on.runs) == 1 and scratch.failed[0].startswith(why)
        assert stand.study.failed


def test_a_run_that_another_process_makes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "RETRY", 0.1)
    stand = Stand(tmp_path, monkeypatch)
    started = stand.run(told={"on, seed 0": "busy"})
    assert started.count("on, seed 0") == 2 and sorted({*started}) == sorted(ORDER)
    assert not stand.runner.failed


def test_a_base_without_its_optimizer_state_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on with a fresh optimizer would be another result under the same key."""
    stand = Stand(tmp_path, monkeypatch)
    key = stand.study.nodes.node("small", 0).key
    keep(stand.study.nodes, record_of(stand.study.nodes, key))
    pretend_trained(stand.study.records, key)
    (stand.study.runs / key / "model/training/checkpoints/checkpoint-6").rmdir()
    assert stand.run() == ORDER
    # And a failure of it is one, although there is a record of it.
    again = Stand(tmp_path / "again", monkeypatch)
    keep(again.study.nodes, record_of(again.study.nodes, key))
    assert again.run(told={"small, seed 0": "fail"}) == ["small, seed 0", "scratch, seed 0"]


def test_ctrl_c_ends_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand, pids = Stand(tmp_path, monkeypatch), []

    def interrupt() -> None:
        while not stand.log.exists() or not stand.log.read_text():
            time.sleep(0.02)
        pids.extend(one.process.pid for one in stand.runner.running)
        os.kill(os.getpid(), 2)

    thread = threading.Thread(target=interrupt)
    # A process that was started in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            stand.run(told={"small, seed 0": "sleep"})
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert pids and not stand.runner.running
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, 0)
            pytest.fail("a worker is still there")


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    child = (
        "import sys; from pathlib import Path; from growkit.study.one_run import held\n"
        "with held(Path(sys.argv[1])) as alone: sys.exit(0 if alone else 75)"
    )
    command = [sys.executable, "-c", child, str(tmp_path)]
    with held(tmp_path) as alone:
        assert alone
        assert os.spawnv(os.P_WAIT, sys.executable, command) == 75
    assert os.spawnv(os.P_WAIT, sys.executable, command) == 0


def test_places_share_cores_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    found = [slot.environment for slot in slots(["cuda:0", "cuda:3"], 2)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["0", "0", "3", "3"]
    assert {one["OMP_NUM_THREADS"] for one in found} == {"2"}
    assert slots(["cpu"], 1)[0].environment["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert slots(["cuda:1"], 1)[0].environment["CUDA_VISIBLE_DEVICES"] == "7"
    with pytest.raises(Exception, match="no device 'cuda:2'"):
        slots(["cuda:2"], 1)
