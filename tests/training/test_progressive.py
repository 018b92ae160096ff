"""Runs that start from no layer or one, and grow late; rates that follow the size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from stage_runs import staged_values
from training_runs import TINY_GDA

from growkit.optimizer_state.find import find_state
from growkit.training import train
from growkit.training.metrics import read_metrics
from growkit.training.read_recipe import make_recipe

GROW = {"layers": 3, "new_layers": "random"}


def values(text: Path, layers: int, **training: Any) -> dict[str, Any]:
    """4 steps of a model of so many layers, then 3 layers."""
    made = staged_values(text, [{"at": {"steps": 4}, "grow": dict(GROW)}], max_steps=6, **training)
    made["model"]["config"] = {**TINY_GDA, "num_hidden_layers": layers}
    return made


@pytest.mark.parametrize("layers", [0, 1])
def test_almost_no_layers_and_then_all(text_file: Path, tmp_path: Path, layers: int) -> None:
    out = tmp_path / "run"
    train(make_recipe(values(text_file, layers)), out)
    rows = read_metrics(out / "training" / "metrics.jsonl")
    (growth,) = [row for row in rows if "growth" in row]
    assert growth["growth"] == {"layers": "3", "new_layers": "random"}
    assert growth["loss_after"] != growth["loss_before"]  # measured and written, not hidden
    assert abs(growth["loss_after"] - growth["loss_before"]) < 0.5
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and len(config["lambda_init"]) == 3
    state = find_state(out)
    assert state is not None
    ages = {name: found.step for name, found in state.parameters.items()}
    assert ages["model.embed_tokens.weight"] == 6  # moments of what existed continue
    assert ages["model.layers.2.mlp.up_proj.weight"] == 2  # new layers begin with none
    assert ages["model.layers.0.mlp.up_proj.weight"] == (6 if layers else 2)


def test_a_run_of_no_layers_resumes_bit_for_bit(text_file: Path, tmp_path: Path) -> None:
    plain = values(text_file, 0)
    del plain["stages"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(make_recipe(plain), whole)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "training" / "checkpoints" / "checkpoint-6")
    (cut / "model.safetensors").unlink()
    train(make_recipe(plain), cut)
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
