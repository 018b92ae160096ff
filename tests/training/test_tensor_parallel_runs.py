"""Layers that processes share (``parallel.tensor``), by gloo on the CPU, against one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from grown_runs import changed, continue_recipe, grow, make_source
from process_runs import run, start
from test_launch import TORCHRUN
from training_runs import TINY_LLAMA, assert_close, cut_back, figures, recipe_values, weights

from growkit.core.errors import UsageError
from growkit.optimizer_state.find import find_state
from growkit.training import train
from growkit.training.parallel.launch import check_launch
from growkit.training.read_recipe import make_recipe

pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers before 5.23")


def write(path: Path, values: dict[str, Any], **parallel: Any) -> Path:
    path.write_text(yaml.safe_dump(values | {"parallel": {"tensor": 2, **parallel}}))
    return path


def llama(text: Path, heads: int = 2, **training: Any) -> dict[str, Any]:
    values = recipe_values(text, **training)
    values["model"]["config"] = {**TINY_LLAMA, "num_key_value_heads": heads}
    return values


def test_two_processes_train_a_grown_model_as_one(text_file: Path, tmp_path: Path) -> None:
    """GDA, its new slots first, with the parent's optimizer state; its checkpoints are whole."""
    heads = {"num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 4}
    source = make_source(text_file, tmp_path / "base", **heads)
    grown = grow(source, tmp_path / "grown")
    recipe = continue_recipe(text_file, grown, train={"new_then_all": 2}, save_steps=2)
    train(recipe, tmp_path / "one")
    file = write(tmp_path / "recipe.yaml", recipe.to_dict())
    run(2, ["train", str(file), "--out", str(tmp_path / "two")])
    assert_close(tmp_path / "two", tmp_path / "one", 1e-5)
    one, two = (tmp_path / name for name in ("one", "two"))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert (two / "config.json").read_bytes() == (one / "config.json").read_bytes()
    frozen = changed(grown, two / "training/checkpoints/checkpoint-2")
    assert sum(old for old, _ in frozen.values()) == 0 < sum(new for _, new in frozen.values())
    states = [find_state(out) for out in (one, two)]
    assert states[0] is not None and states[1] is not None
    assert states[0].parameters.keys() == states[1].parameters.keys()

    cut = shutil.copytree(two, tmp_path / "cut")
    cut_back(cut, 4)
    run(2, ["train", str(file), "--out", str(cut)])
    assert weights(cut) == weights(two) and figures(cut) == figures(two)

    cut_back(cut, 4)  # the parts of layers become parts of rows
    rows = write(tmp_path / "rows.yaml", recipe.to_dict(), tensor=1, strategy="fsdp")
    launch = run(1, ["train", str(rows), "--out", str(cut)])
    assert "parallel.tensor 2 -> 1" in launch.output() or "parallel.strategy" in launch.output()
    assert_close(cut, one, 1e-5)


def test_four_processes_share_layers_and_data(text_file: Path, tmp_path: Path) -> None:
    """Tensor parallelism inside FSDP2, on a mesh of two dimensions."""
    values = llama(text_file, max_steps=3, decay_steps=0, optimizer="adamw")
    train(make_recipe(values), tmp_path / "one")
    file = write(tmp_path / "recipe.yaml", values, strategy="fsdp")
    run(4, ["train", str(file), "--out", str(tmp_path / "four")])
    assert_close(tmp_path / "four", tmp_path / "one", 1e-5)


@pytest.mark.parametrize(
    ("parallel", "processes", "message"),
    [
        ({}, "1", "tensor is 2 and 1 process was started.*--nproc-per-node 2"),
        ({"tensor": 3}, "4", "tensor is 3 and 4 processes were started.*--nproc-per-node 3"),
        ({}, "4", "leaves 2 to divide the data.*strategy: fsdp"),
        ({"strategy": "fsdp"}, "16", "4 sequences .* cannot be shared evenly by 8"),
    ],
)
def test_launches_that_do_not_fit(
    parallel: dict[str, Any], processes: str, message: str, text_file: Path
) -> None:
    recipe = make_recipe(llama(text_file) | {"parallel": {"tensor": 2, **parallel}})
    environment = {} if processes == "1" else {**TORCHRUN, "WORLD_SIZE": processes}
    with pytest.raises(UsageError, match=message):
        check_launch(recipe, environment)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**TINY_LLAMA}, "tensor 2 does not divide the model's 1 heads (num_key_value_heads)"),
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}, "no plan for tensor"),
    ],
    ids=["heads", "no plan"],
)
def test_models_that_cannot_be_shared(
    config: dict[str, Any], message: str, text_file: Path, tmp_path: Path
) -> None:
    values = recipe_values(text_file)
    values["model"]["config"] = config
    file = write(tmp_path / "recipe.yaml", values)
    launch = start(2, ["train", str(file), "--out", str(tmp_path / "out")])
    assert launch.wait() == [2, 2]
    said = " ".join(launch.output().split())
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "out" / "config.json").exists()
    assert json.dumps(config)  # the recipe's own is not changed
