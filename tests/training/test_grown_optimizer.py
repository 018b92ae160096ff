"""A run that starts from a grown folder continues with the optimizer state that grew with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import TINY_GDA, recipe_values

from growkit.growing import grow_checkpoint
from growkit.optimizer_state.find import find_state
from growkit.surgery.request import GrowthRequest
from growkit.training import Silent, train
from growkit.training.checkpoints import list_checkpoints
from growkit.training.read_recipe import make_recipe


class Listening(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = recipe_values(text_file)
    values["model"]["config"] = dict(TINY_GDA)
    out = tmp_path_factory.mktemp("run") / "run"
    train(make_recipe(values), out)
    return out


def continued(start: Path, out: Path, text: Path, **model: Any) -> tuple[Path, list[str]]:
    values = recipe_values(text, max_steps=1, warmup_steps=0, decay_steps=0, save_steps=1)
    values["model"] = {"checkpoint": str(start), **model}
    del values["tokenizer"]
    listening = Listening()
    train(make_recipe(values), out, reporter=listening)
    return list_checkpoints(out / "training" / "checkpoints")[-1], listening.notes


def counters(checkpoint: Path) -> set[float | None]:
    state = find_state(checkpoint)
    assert state is not None
    return {found.step for found in state.parameters.values()}


def test_grown_run_goes_on(run: Path, text_file: Path, tmp_path: Path) -> None:
    """From the folder of a finished run, whose state lies in its last checkpoint."""
    request = GrowthRequest(signal_heads="x2", layers="+1")
    _, manifest = grow_checkpoint(run, tmp_path / "grown", request, verify=False)
    told = manifest["optimizer_state"]
    assert told["source"]["step"] == 12 and told["source"]["groups"][0]["kind"] == "adamw"
    newest, notes = continued(tmp_path / "grown", tmp_path / "on", text_file)
    said = next(note for note in notes if note.startswith("Optimizer state grown"))
    assert "30 of 44 parameters continue at step 12; begin anew: model.layers.2." in said
    assert any("Moments of q are estimates" in note for note in notes)
    assert counters(newest) == {13.0, 1.0}


def test_reset_in_the_recipe(run: Path, text_file: Path, tmp_path: Path) -> None:
    source = run / "training" / "checkpoints" / "checkpoint-6"
    request = GrowthRequest(ffn="x2")
    grow_checkpoint(source, tmp_path / "grown", request, verify=False)
    newest, notes = continued(
        tmp_path / "grown", tmp_path / "reset", text_file, optimizer_state="reset"
    )
    assert counters(newest) == {1.0}
    assert not any("Optimizer state" in note for note in notes)
    newest, _ = continued(tmp_path / "grown", tmp_path / "on", text_file)
    assert counters(newest) == {7.0}


def test_resume_does_not_load_it_again(run: Path, text_file: Path, tmp_path: Path) -> None:
    grow_checkpoint(run, tmp_path / "grown", GrowthRequest(ffn="x2"), verify=False)
    values = recipe_values(text_file, max_steps=4, warmup_steps=0, decay_steps=0, save_steps=2)
    values["model"] = {"checkpoint": str(tmp_path / "grown")}
    del values["tokenizer"]
    train(make_recipe(values), tmp_path / "whole")
    train(make_recipe(values), tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "training" / "checkpoints" / "checkpoint-4")
    (tmp_path / "cut" / "growkit_training.json").unlink()
    train(make_recipe(values), tmp_path / "cut")
    states = [
        find_state(tmp_path / name / "training" / "checkpoints" / "checkpoint-4")
        for name in ("whole", "cut")
    ]
    assert states[0] is not None and states[1] is not None
    for name, found in states[0].parameters.items():
        assert found.step == 16
        for kind, moment in found.moments.items():
            other = states[1].parameters[name].moments[kind]
            assert np.array_equal(moment.read(), other.read())
