"""Models whose parameters are stacked when they are loaded: the map follows them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from family_checkpoints import family_config, write_checkpoint
from grown_runs import changed, grow
from training_runs import cut_back, figures, recipe_values, weights
from transformers import AutoModelForCausalLM

from growkit.record.manifest import read_manifest
from growkit.training import Recipe, train
from growkit.training.growth.slots import converted_slots, map_slots
from growkit.training.read_recipe import make_recipe


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    config = family_config("mixtral", num_hidden_layers=1, vocab_size=257)
    write_checkpoint(folder / "source", config)
    return grow(folder / "source", folder / "grown", experts="x2", ffn="x2")


def recipe_of(grown: Path, text: Path, **training: object) -> Recipe:
    settings = {"max_steps": 4, "schedule": "constant", "warmup_steps": 0, "save_steps": 2}
    values = recipe_values(text, **{**settings, **training})
    values["model"] = {"checkpoint": str(grown)}
    values["tokenizer"] = {"bytes": True}
    return make_recipe(values)


def test_old_experts_keep_their_bytes(grown: Path, text_file: Path, tmp_path: Path) -> None:
    """On the disk an expert is a tensor of its own; in memory it is a slice of one."""
    recipe = recipe_of(grown, text_file, train="new", weight_decay=0.5, average_checkpoints=2)
    counts = changed(grown, train(recipe, tmp_path / "run").out)
    assert sum(old for old, _ in counts.values()) == 0
    moved = {name for name, (_, new) in counts.items() if new}
    assert any("experts.0.w1" in name for name in moved)  # new units of an old expert
    assert any("experts.7.w2" in name for name in moved)  # a new expert
    assert any("gate" in name for name in moved)


def test_both_layouts_on_the_disk_make_the_same_slots(tmp_path: Path) -> None:
    """One tensor an expert goes through transformers' conversion; stacks are read as they are."""
    maps = []
    for fused in (False, True):
        folder = tmp_path / str(fused)
        config = family_config("qwen3_moe", num_hidden_layers=1)
        write_checkpoint(folder / "source", config, fused=fused)
        out = grow(folder / "source", folder / "grown", experts="x2", ffn="x2", hidden="x2")
        model = AutoModelForCausalLM.from_pretrained(out)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        new = (read_manifest(out) or {})["new_parameters"]
        assert (new.keys() <= shapes.keys()) == fused
        maps.append((map_slots(new, shapes) if fused else converted_slots(new, out, model), shapes))
    (separate, shapes), (stacked, _) = maps
    for name in shapes:
        assert separate.part(name) == stacked.part(name)
        if separate.part(name) == "mixed":
            assert (separate.slots(name).mask() == stacked.slots(name).mask()).all(), name
    down = stacked.slots("model.layers.0.mlp.experts.down_proj").mask()
    assert down.shape == (8, 64, 32) and not down[:4, :32, :16].any()
    assert down[4:].all() and down[:4, 32:].all() and down[:4, :, 16:].all()


def test_old_experts_move_otherwise(grown: Path, text_file: Path, tmp_path: Path) -> None:
    """Negative control."""
    recipe = recipe_of(grown, text_file, weight_decay=0.5)
    counts = changed(grown, train(recipe, tmp_path / "run").out)
    assert all(old for name, (old, _) in counts.items() if "experts.0." in name)


def test_a_resumed_run_goes_on_with_what_its_experts_learnt(
    text_file: Path, tmp_path: Path
) -> None:
    """transformers' Trainer leaves stacked experts at what the run began with."""
    config = family_config("qwen3_moe", num_hidden_layers=1, vocab_size=257)
    write_checkpoint(tmp_path / "source", config)
    recipe = recipe_of(tmp_path / "source", text_file, logging_steps=1)
    whole = train(recipe, tmp_path / "whole").out
    shutil.copytree(whole, tmp_path / "cut")
    cut_back(tmp_path / "cut", 2)
    cut = train(recipe, tmp_path / "cut").out
    assert figures(cut) == figures(whole) and weights(cut) == weights(whole)
