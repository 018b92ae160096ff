"""One tiny study for real, and everything that may happen to it afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from process_runs import ForkedRun
from safetensors.numpy import load_file
from tiny_studies import STEP, TINY_GDA, losses, study_of, values

from growkit.cli.main import main
from growkit.data.order import SampleOrder
from growkit.study import runner
from growkit.study.recipe import StudyRecipe
from growkit.study.results import StudyResult, result_from
from growkit.study.selection import choose
from growkit.study.study import Study
from growkit.training import train
from growkit.training.read_recipe import make_recipe

BASE_STEPS, STEPS = 24, 48


def recipe_values(**changes: Any) -> dict[str, Any]:
    whole = values(budget={"tokens": STEPS * STEP, "arm": "on"}, **changes)
    whole["bases"]["small"]["tokens"] = BASE_STEPS * STEP
    whole["arms"]["fresh"] = whole["arms"]["on"] | {"optimizer_state": "reset"}
    return whole


@dataclass(frozen=True)
class Made:
    out: Path
    runs: Path
    recipe: Path
    study: StudyRecipe
    result: StudyResult

    @property
    def again(self) -> Study:
        return Study(self.study, self.out, self.runs)

    def weights(self, name: str) -> bytes:
        key = self.again.nodes.node(name, 0).key
        return (self.runs / key / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def forked_runs() -> Iterator[None]:
    """What each run imports is most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            runner, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": ForkedRun})
        )
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("study")
    recipe, out = folder / "tiny.yaml", folder / "out"
    recipe.write_text(yaml.safe_dump(recipe_values(), sort_keys=False))
    assert main(["study", str(recipe), "--out", str(out), "--workers", "2", "--quiet"]) == 0
    result = result_from(json.loads((out / "study.json").read_text()))
    return Made(out, out / "runs", recipe, study_of(**recipe_values()), result)


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_every_arm_has_its_whole_run(made: Made) -> None:
    assert set(losses(made.result)) == {"on", "signal", "scratch", "fresh"}
    for arm in made.result.arms:
        (run,) = arm.runs
        assert made.result.budget - arm.flops_per_token * STEP < run.flops <= made.result.budget
        assert run.phases[0].steps == (run.phases[-1].steps if arm.from_scratch else BASE_STEPS)
        assert run.curve[-1].flops == pytest.approx(run.flops) and run.final_loss < 6.0
        assert run.measures["bits_per_byte"] > 0 and not arm.failed
    assert {path.name for path in made.out.iterdir()} >= {"study.html", "table.md", "study.yaml"}
    assert made.result.held_out_tokens == 512 // 16 * 15


def test_a_grown_arm_begins_where_its_base_ended(made: Made) -> None:
    (run,) = made.result.arm("signal").runs
    small, grown = run.phases
    assert grown.first_loss == pytest.approx(small.last_loss, abs=2e-6)
    assert grown.change == "grow: signal_heads x2" and "exact" in (grown.exactness or "")


def test_going_on_is_the_uninterrupted_run(made: Made, tmp_path: Path) -> None:
    """An arm without growth is one run of both lengths, bit for bit; with fresh moments it is
    another (the control)."""
    whole = made.again.nodes.node("small", 0).recipe
    whole["training"] |= {"max_steps": STEPS, "decay_steps": 1}
    train(make_recipe(whole), tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == made.weights("on")
    assert made.weights("fresh") != made.weights("on")


def test_all_arms_read_the_same_samples(made: Made) -> None:
    """By position: a grown arm goes on where its base stopped."""

    def read(name: str, seed: int) -> dict[int, int]:
        node = made.again.nodes.node(name, seed)
        recipe = make_recipe({**node.recipe, "model": {"config": TINY_GDA}})
        order = SampleOrder([100], recipe.training.seed)
        first = recipe.first_step * recipe.sequences_per_step
        return {at: order[at] for at in range(first, recipe.end_step * recipe.sequences_per_step)}

    small, signal, scratch = (read(name, 0) for name in ("small", "signal", "scratch"))
    assert min(signal) == len(small) and max(small) + 1 == min(signal)
    both = {**small, **signal}
    assert len(scratch) < len(both) and scratch.items() <= both.items()
    assert read("scratch", 1) != scratch


def test_a_second_call_runs_nothing(made: Made) -> None:
    before, runs = stamps(made.out / "records"), stamps(made.runs)
    assert main(["study", str(made.recipe), "--out", str(made.out), "--quiet"]) == 0
    assert stamps(made.out / "records") == before
    assert stamps(made.runs) == runs


def test_records_are_enough(made: Made, tmp_path: Path) -> None:
    """Without the trained models nothing is made again."""
    out = tmp_path / "out"
    shutil.copytree(made.out, out, ignore=shutil.ignore_patterns("runs"))
    before = stamps(out / "records")
    study = Study(made.study, out, out / "runs")
    assert study.wanted(choose(made.study)) == []
    assert losses(study.run(choose(made.study))) == losses(made.result)
    assert stamps(out / "records") == before
    # An arm that is added later needs its base once more.
    arms = recipe_values()["arms"] | {"ffn": {"base": "small", "grow": {"ffn": "x2"}}}
    more = Study(study_of(**recipe_values() | {"arms": arms}), out, out / "runs")
    assert [node.name for node in more.wanted(choose(more.recipe))] == ["small, seed 0"]


def test_studies_share_runs(made: Made, tmp_path: Path) -> None:
    arms = {**recipe_values()["arms"], "ffn": {"base": "small", "grow": {"ffn": "x2"}}}
    recipe = study_of(**recipe_values() | {"question": "Another?", "arms": arms})
    study = Study(recipe, tmp_path / "other", made.runs)
    assert [node.name for node in study.wanted(choose(recipe))] == ["ffn, seed 0"]
    assert study.progress(choose(recipe)) == (5, 6)
    found = losses(study.result())
    assert found.pop("ffn") == [] and found == losses(made.result)


def test_a_killed_study_goes_on_to_the_same_result(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["study", str(made.recipe), "--out", str(out), "--arms", "on", "--quiet"]
    command = [sys.executable, "-c", "import sys; from growkit.cli.main import main; "
               "sys.exit(main(sys.argv[1:]))", *line]  # fmt: skip
    process = subprocess.Popen(command)
    folder = out / "runs" / made.again.nodes.node("small", 0).key
    begun = folder / "model" / "training" / "checkpoints"
    while not (begun / "checkpoint-6").exists():
        assert process.poll() is None
        time.sleep(0.005)
    workers = children(process.pid)
    for pid in (process.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert workers and not (folder / "record.json").exists()
    assert main(line) == 0
    result = result_from(json.loads((out / "study.json").read_text()))
    assert losses(result)["on"] == losses(made.result)["on"]
    key = made.again.nodes.node("on", 0).key
    assert (out / "runs" / key / "model" / "model.safetensors").read_bytes() == made.weights("on")


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def test_a_run_ends_when_its_study_is_gone(tmp_path: Path) -> None:
    worker = (
        "import sys, time; from growkit.study.one_run import end_with_parent\n"
        "end_with_parent(int(sys.argv[1]), 0.05); print('up', flush=True); time.sleep(60)"
    )
    study = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {worker!r}, str(os.getpid())])\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", study], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    process.kill()
    assert process.stdout.read() == b""  # its end of the pipe is closed: the worker is gone
    process.wait()


def test_the_text_moved_under_a_run_that_had_begun(made: Made, tmp_path: Path) -> None:
    """The folder of runs may be moved; what is half done goes on there."""
    runs = tmp_path / "moved"
    study = Study(made.study, tmp_path / "out", runs)
    node = study.nodes.node("signal", 0)
    for key in (node.key, node.parent.key if node.parent else ""):
        shutil.copytree(made.runs / key, runs / key)
    (runs / node.key / "record.json").unlink()
    assert [one.name for one in study.wanted(choose(made.study, ["signal"]))] == [node.name]
    assert (
        losses(study.run(choose(made.study, ["signal"])))["signal"]
        == (losses(made.result)["signal"])
    )
    grown = load_file(runs / node.key / "model" / "model.safetensors")
    assert grown and (runs / node.key / "model" / "model.safetensors").read_bytes() == (
        made.weights("signal")
    )
