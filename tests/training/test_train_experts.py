"""Models whose parameters are stacked when they are loaded: the map follows them."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_checkpoints import family_config, write_checkpoint
from grown_runs import changed, grow
from training_runs import recipe_values

from growkit.training import Recipe, train
from growkit.training.recipe import make_recipe


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


def test_old_experts_move_otherwise(grown: Path, text_file: Path, tmp_path: Path) -> None:
    """Negative control."""
    recipe = recipe_of(grown, text_file, weight_decay=0.5)
    counts = changed(grown, train(recipe, tmp_path / "run").out)
    assert all(old for name, (old, _) in counts.items() if "experts.0." in name)
