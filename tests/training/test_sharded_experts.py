"""Mixtures in parts: experts stored one by one, stacked in memory, held by halves; moments."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from family_checkpoints import family_config, write_checkpoint
from grown_runs import changed, grow
from process_runs import run
from safetensors.torch import load_file
from training_runs import assert_close, cut_back, figures, needs_sharding, recipe_values, weights
from transformers import AutoConfig, AutoModelForCausalLM

from growkit.growing import grow_checkpoint
from growkit.optimizer_state.find import find_state
from growkit.optimizer_state.load import load_into
from growkit.optimizer_state.stacked import stored_layout
from growkit.optimizer_state.store import read_store
from growkit.surgery.request import GrowthRequest
from growkit.training import train
from growkit.training.read_recipe import make_recipe

pytestmark = needs_sharding


def values(text: Path, folder: Path, **training: Any) -> dict[str, Any]:
    settings = {"max_steps": 4, "schedule": "constant", "warmup_steps": 0, "save_steps": 2}
    made = recipe_values(text, **{**settings, **training})
    made["model"] = {"checkpoint": str(folder)}
    made["tokenizer"] = {"bytes": True}
    return made


def in_two(made: dict[str, Any], folder: Path) -> Path:
    made["parallel"] = {"strategy": "fsdp"}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(made))
    run(2, ["train", str(recipe), "--out", str(folder / "two")])
    return recipe


def test_two_halves_of_a_grown_mixtral(text_file: Path, tmp_path: Path) -> None:
    """Read by parts, new slots alone trained, averaged, written one by one, resumed."""
    write_checkpoint(
        tmp_path / "source", family_config("mixtral", num_hidden_layers=1, vocab_size=257)
    )
    grown = grow(tmp_path / "source", tmp_path / "grown", experts="x2", ffn="x2")
    made = values(text_file, grown, train="new", average_checkpoints=2)
    train(make_recipe(made), tmp_path / "one")
    recipe = in_two(made, tmp_path)
    assert_close(tmp_path / "two", tmp_path / "one", 1e-5)
    counts = changed(grown, tmp_path / "two").values()
    assert sum(old for old, _ in counts) == 0 < sum(new for _, new in counts)
    shutil.copytree(tmp_path / "two", tmp_path / "cut")
    cut_back(tmp_path / "cut", 2)
    run(2, ["train", str(recipe), "--out", str(tmp_path / "cut")])
    assert weights(tmp_path / "cut") == weights(tmp_path / "two")
    assert figures(tmp_path / "cut") == figures(tmp_path / "two")


def test_two_halves_of_a_qwen3_that_gets_experts_on_the_way(
    text_file: Path, tmp_path: Path
) -> None:
    """A dense model, a mixture, a larger mixture; moments of stacks become those of experts."""
    write_checkpoint(
        tmp_path / "source",
        family_config("qwen3", num_hidden_layers=1, vocab_size=257, intermediate_size=32),
    )
    made = values(text_file, tmp_path / "source", max_steps=6, save_steps=6, probe_steps=0)
    made["stages"] = [
        {"at": {"steps": 2}, "grow": {"experts": 2}},
        {"at": {"steps": 4}, "grow": {"experts": 4, "experts_per_token": 4}},
    ]
    train(make_recipe(made), tmp_path / "one")
    in_two(made, tmp_path)
    assert_close(tmp_path / "two", tmp_path / "one", 1e-5)
    state = find_state(tmp_path / "two")
    assert state is not None
    stack = state.parameters["model.layers.0.mlp.experts.gate_up_proj"]
    assert stack.step == 6 and stack.moments["exp_avg"].shape == (4, 64, 32)
    assert state.parameters["model.layers.0.mlp.gate.weight"].step == 4  # the router came later


def test_moments_of_upcycled_experts_are_those_of_the_ffn(text_file: Path, tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path / "source", family_config("llama", num_hidden_layers=1, vocab_size=257)
    )
    dense = train(make_recipe(values(text_file, tmp_path / "source")), tmp_path / "dense").out
    grow_checkpoint(dense, tmp_path / "moe", GrowthRequest(experts=4), verify=False)
    before = find_state(dense)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    optimizer = torch.optim.AdamW(model.parameters())
    loaded = load_into(optimizer, model, read_store(tmp_path / "moe" / "growkit_optimizer"))
    assert before is not None and loaded.fresh == ("model.layers.0.mlp.gate.weight",)
    assert not loaded.unused
    experts = dict(model.named_parameters())["model.layers.0.mlp.experts.gate_up_proj"]
    found = optimizer.state[experts]
    for kind, factor in (("exp_avg", 1 / 4), ("exp_avg_sq", 1 / 4)):
        old = [
            before.parameters[f"model.layers.0.mlp.{name}.weight"].moments[kind].read()
            for name in ("gate_proj", "up_proj")
        ]
        for expert in found[kind]:
            np.testing.assert_allclose(expert.numpy(), factor * np.concatenate(old), rtol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_layout_is_that_of_the_saved_files(kind: str, tmp_path: Path) -> None:
    """The oracle: what ``save_pretrained`` writes."""
    write_checkpoint(tmp_path, family_config(kind, num_hidden_layers=2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    stored = load_file(tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    for asked in (model, empty):
        layout = stored_layout(asked, shapes)
        assert layout is not None
        assert {part.name for s in layout.values() for part in s.parts} == stored.keys()
    for name, parameter in model.named_parameters():
        for part in layout[name].parts:
            flat = parameter.detach().reshape(-1)[part.first : part.end]
            assert torch.equal(flat.view(part.shape), stored[part.name]), part.name
