"""Several processes make the run that one process makes, and what one of them wrote goes on in any
number of them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from process_runs import growkit, run, start
from training_runs import TINY_GDA, assert_close, cut_back, figures, recipe_values, weights

from growkit.training import train
from growkit.training.checkpoints import damage, list_checkpoints
from growkit.training.metrics import read_metrics
from growkit.training.read_recipe import make_recipe

DROPOUT = {
    "model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64,
    "resid_pdrop": 0.5,
}  # fmt: skip


def write_recipe(path: Path, text: Path, model: dict[str, Any], **training: Any) -> Path:
    values = recipe_values(text, **training)
    values["model"]["config"] = dict(model)
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def recipe(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "gda.yaml", text_file, TINY_GDA)


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(make_recipe(yaml.safe_load(recipe.read_text())), out)
    return out


@pytest.fixture(scope="module")
def together(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes."""
    out = tmp_path_factory.mktemp("together") / "run"
    run(2, ["train", str(recipe), "--out", str(out)])
    return out


def test_two_processes_under_torchrun_make_the_run_of_one(
    recipe: Path, alone: Path, tmp_path: Path
) -> None:
    """The launcher itself, as users start it; only the first process writes and speaks."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--standalone", "-m", "growkit",
               "train", str(recipe), "--out", str(out), "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # torch 2.9's gloo counts its peers aloud, and on stdout.
    said, _ = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])
    assert said["steps"] == 12
    assert_close(out, alone, 1e-5)
    for checkpoint in list_checkpoints(out / "training" / "checkpoints"):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        assert manifest["processes"] == 2
        assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= manifest["files"].keys()


def _read_own_data_twice(arguments: Sequence[str]) -> int:
    from growkit.data.order import RunSampler

    original = RunSampler.__iter__

    def twice(self: RunSampler) -> Any:
        for number, index in enumerate(original(self)):
            # 2 sequences a batch, batches in turn: what the second process reads becomes
            # what the first one reads.
            if number % 4 < 2:
                kept = index if number % 4 == 0 else kept  # noqa: F821
                yield index
            else:
                yield kept

    RunSampler.__iter__ = twice  # type: ignore[method-assign]
    return growkit(arguments)


def test_processes_that_read_the_same_data_are_noticed(
    recipe: Path, alone: Path, tmp_path: Path
) -> None:
    """Negative control."""
    run(2, ["train", str(recipe), "--out", str(tmp_path / "run")], _read_own_data_twice)
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "run", alone, 1e-5)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_resume_in_any_number_of_processes(
    before: int, after: int, recipe: Path, alone: Path, together: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(together if before == 2 else alone, out)
    cut_back(out, 6)
    run(after, ["train", str(recipe), "--out", str(out)])
    if before == after:
        assert weights(out) == weights(together) and figures(out) == figures(together)
    else:
        assert_close(out, alone, 1e-5)


def test_dropout_of_two_processes_is_resumed_and_is_not_the_same_in_both(
    text_file: Path, tmp_path: Path
) -> None:
    training = {"max_steps": 6, "decay_steps": 2}
    path = write_recipe(tmp_path / "recipe.yaml", text_file, DROPOUT, **training)
    out, cut = tmp_path / "whole", tmp_path / "cut"
    run(2, ["train", str(path), "--out", str(out)])
    shutil.copytree(out, cut)
    cut_back(cut, 3)
    run(2, ["train", str(path), "--out", str(cut)])
    assert weights(cut) == weights(out) and figures(cut) == figures(out)
    states = [
        (out / "training" / "checkpoints" / "checkpoint-3" / f"rng_state_{r}.pth").read_bytes()
        for r in (0, 1)
    ]
    assert states[0] != states[1]


def test_kill_of_all_processes_at_any_moment(text_file: Path, tmp_path: Path) -> None:
    """SIGKILL, data loading workers, an epoch that ends in the middle of the run."""
    path = write_recipe(
        tmp_path / "recipe.yaml", text_file, TINY_GDA,
        max_steps=20, save_steps=4, dataloader_num_workers=1,
    )  # fmt: skip
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    step = random.randint(5, 16)
    launch = start(2, ["train", str(path), "--out", str(killed)])
    metrics = killed / "training" / "metrics.jsonl"
    while all(process.is_alive() for process in launch.processes):
        rows = read_metrics(metrics)
        if rows and rows[-1]["step"] >= step:
            break
        time.sleep(0.01)
    for process in launch.processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    assert launch.wait() == [-9, -9]
    assert not (killed / "config.json").exists()
    run(2, ["train", str(path), "--out", str(killed)])
    run(2, ["train", str(path), "--out", str(whole)])
    assert weights(killed) == weights(whole) and figures(killed) == figures(whole), step


def _second_fails(arguments: Sequence[str]) -> int:
    from growkit.training.trainer import RunTrainer

    original = RunTrainer.training_step

    def training_step(self: RunTrainer, *given: Any, **options: Any) -> Any:
        if self.processes.rank == 1 and self.state.global_step == 4:
            raise RuntimeError("the second process failed")
        return original(self, *given, **options)

    RunTrainer.training_step = training_step  # type: ignore[method-assign]
    return growkit(arguments)


def _first_cannot_write(arguments: Sequence[str]) -> int:
    from growkit.training import checkpoints

    def publish(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    checkpoints.publish = publish
    return growkit(arguments)


@pytest.mark.parametrize(
    ("work", "rank", "message"),
    [(_second_fails, 1, "the second process failed"), (_first_cannot_write, 0, "disk became full")],
)
def test_a_process_that_fails_ends_the_others(
    work: Any, rank: int, message: str, recipe: Path, tmp_path: Path
) -> None:
    launch = start(2, ["train", str(recipe), "--out", str(tmp_path / "run")], work)
    assert launch.wait(60) == [1, 1]
    assert message in launch.output(rank)
    assert "Traceback" not in launch.output(1 - rank)
    for checkpoint in list_checkpoints(tmp_path / "run" / "training" / "checkpoints"):
        assert damage(checkpoint) is None


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_saves_and_the_same_command_goes_on(
    count: int, recipe: Path, alone: Path, together: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["train", str(recipe), "--out", str(out)]
    launch = start(count, command, _slow)
    metrics = out / "training" / "metrics.jsonl"
    # Between two log lines and two saves: the next log line spans the stop.
    while not any(row["step"] == 4 and "eval_loss" in row for row in read_metrics(metrics)):
        assert all(process.is_alive() for process in launch.processes), launch.output()
        time.sleep(0.01)
    first = launch.processes[0].pid
    assert first is not None
    os.kill(first, signal.SIGTERM)  # the others learn it from the first
    assert launch.wait() == [143] * count
    assert "stopped: SIGTERM at step 5 of 12" in launch.output()
    newest = list_checkpoints(out / "training" / "checkpoints")[-1]
    assert newest.name == "checkpoint-5" and damage(newest) is None
    run(count, command)
    expected = alone if count == 1 else together
    assert weights(out) == weights(expected) and figures(out) == figures(expected)


def _slow(arguments: Sequence[str]) -> int:
    """Leave the test time to send its signal in the fifth step."""
    from growkit.training.trainer import RunTrainer

    original = RunTrainer.training_step

    def training_step(self: RunTrainer, *given: Any, **options: Any) -> Any:
        if self.state.global_step == 4:
            time.sleep(0.5)
        return original(self, *given, **options)

    RunTrainer.training_step = training_step  # type: ignore[method-assign]
    return growkit(arguments)


def test_second_launch_into_the_same_folder_is_refused(recipe: Path, tmp_path: Path) -> None:
    """Whatever started them: two runs that know nothing of each other do not share a folder."""
    out = tmp_path / "run"
    command = ["train", str(recipe), "--out", str(out)]
    first = start(1, command, _slow)
    while not (out / "training" / "recipe.yaml").is_file():
        time.sleep(0.01)
    second = start(1, command)
    assert second.wait() == [1]
    assert "Another process is training into" in second.output()
    assert first.wait() == [0]
