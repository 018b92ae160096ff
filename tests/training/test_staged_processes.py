"""Runs that grow on the way, in several processes: the first one grows, all read their part."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from process_runs import growkit, run, start
from stage_runs import staged_values
from training_runs import assert_close, figures, needs_sharding, weights

from growkit.training import train
from growkit.training.read_recipe import make_recipe

# By step, and by a plateau that any loss is: decided by the first process, obeyed by all.
STAGES = [
    {"at": {"steps": 2}, "grow": {"signal_heads": "x2"}},
    {
        "at": {"plateau": {"loss_per_million_tokens": 1e9, "window_tokens": 3 * 64}},
        "grow": {"ffn": "x1.5", "layers": "+1"},
    },
]


def values(text: Path, strategy: str) -> dict[str, Any]:
    made = staged_values(text, STAGES, max_steps=8, logging_steps=1, probe_steps=0)
    made["parallel"] = {"strategy": strategy}
    return dict(made)


@pytest.fixture(scope="module")
def alone(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(make_recipe(values(text_file, "ddp")), out)
    return out


@pytest.fixture(scope="module")
def sharded(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and its run in two processes that hold a half each."""
    folder = tmp_path_factory.mktemp("sharded")
    recipe, out = folder / "recipe.yaml", folder / "run"
    recipe.write_text(yaml.safe_dump(values(text_file, "fsdp")))
    launch = run(2, ["train", str(recipe), "--out", str(out)])
    assert "Growth 2, from checkpoint-6" in launch.output(0) and not launch.output(1).strip()
    return recipe, out


@needs_sharding
def test_growths_between_two_halves_make_the_run_of_one_process(
    alone: Path, sharded: tuple[Path, Path]
) -> None:
    _, out = sharded
    assert_close(out, alone, 1e-5)
    grown = [row for row in figures(out) if "growth" in row]
    assert [row["step"] for row in grown] == [2, 6]
    assert all(abs(row["loss_before"] - row["loss_after"]) < 1e-5 for row in grown)


def test_every_process_holds_the_model(alone: Path, text_file: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(values(text_file, "ddp")))
    run(2, ["train", str(recipe), "--out", str(out)])
    assert_close(out, alone, 1e-5)


@needs_sharding
def test_kill_of_all_inside_a_growth_and_behind_it(
    sharded: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, whole = sharded
    out = tmp_path / "run"
    stages = out / "training" / "stages"
    moments = [stages / "1-grown.partial", stages / "1/training/checkpoints/checkpoint-3"]
    killed = 0
    for moment in moments:
        launch = start(2, ["train", str(recipe), "--out", str(out)])
        while all(process.is_alive() for process in launch.processes) and not moment.exists():
            time.sleep(0.001)
        for process in launch.processes:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        killed += launch.wait() == [-9, -9]
    assert killed == len(moments)
    run(2, ["train", str(recipe), "--out", str(out), "--resume", "auto"])
    assert weights(out) == weights(whole) and figures(out) == figures(whole)
    assert not list(out.rglob("*.partial"))


def _second_sees_another_growth(arguments: Sequence[str]) -> int:
    from growkit.training.growth import stages

    original = stages.read_manifest

    def read_manifest(folder: Path) -> Any:
        return {} if os.environ["RANK"] == "1" else original(folder)

    stages.read_manifest = read_manifest
    return growkit(arguments)


@needs_sharding
def test_a_growth_that_one_process_sees_otherwise_ends_all(
    sharded: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, whole = sharded
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("growkit_training.json", "training/stages/2/growkit_training.json"):
        (out / name).unlink()
    launch = start(2, ["train", str(recipe), "--out", str(out)], _second_sees_another_growth)
    assert launch.wait() == [1, 1]
    assert "sees another folder" in launch.output(0)
