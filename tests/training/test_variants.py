"""Attention variants from a recipe: trained, published, loaded and grown like any other model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from training_runs import TINY_LLAMA, recipe_values
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from growkit.core.errors import UsageError
from growkit.recipe.shipped import find_recipe
from growkit.training import load_recipe, train
from growkit.training.models import make_config
from growkit.training.read_recipe import make_recipe
from growkit.verification import verify_checkpoints

VARIANTS: dict[str, dict[str, Any]] = {
    "diff_v2": {"attention": "diff_v2", "num_attention_heads": 4, "num_key_value_heads": 2},
    "sas": {
        "attention": "sas",
        "num_simulated_heads": 4,
        "simulated_head_dim": 12,
        "sas_kernel_size": 3,
    },
}


def config_values(name: str) -> dict[str, Any]:
    return {**TINY_LLAMA, "model_type": "growkit", "head_dim": 8, **VARIANTS[name]}


@pytest.mark.parametrize("name", VARIANTS)
def test_trained_from_a_recipe_and_grown(name: str, text_file: Path, tmp_path: Path) -> None:
    steps = {"max_steps": 4, "warmup_steps": 1, "decay_steps": 1, "save_steps": 4, "eval_steps": 4}
    values = recipe_values(text_file, **steps)
    values["model"]["config"] = config_values(name)
    train(make_recipe(values), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.attention == name
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()
    tiny.grow(tmp_path / "run", tmp_path / "grown", ffn="x2", layers="+1")
    report = verify_checkpoints(
        tmp_path / "run", tmp_path / "grown", tokens=48, window=24, generate_tokens=3
    )
    assert report.passed


def test_the_shipped_recipe_names_the_fields_of_every_variant() -> None:
    """Each line of its comment is a config that can be made."""
    path = find_recipe(Path("train-variant-small"))
    base = load_recipe(path).model.config
    lines = re.findall(r"^#   (\w+): +(\w+: .*?)(?:  .*)?$", path.read_text(), re.MULTILINE)
    assert {name for name, _ in lines} == {"gda_gated", "shared_diff", "wgqa", "sas"}
    tokenizer = ByT5Tokenizer()
    for name, text in [*lines, ("gqa", ""), ("diff_v1", "")]:
        fields: dict[str, Any] = dict(re.findall(r"(\w+): (\w+)", text))
        numbers = {key: int(value) for key, value in fields.items() if value.isdigit()}
        make_config({**base, **fields, **numbers, "attention": name}, tokenizer)


def test_fields_that_do_not_fit_are_named(text_file: Path) -> None:
    wrong = config_values("diff_v2") | {"num_key_value_heads": 4}
    with pytest.raises(UsageError, match="num_key_value_heads = 4"):
        make_config(wrong, ByT5Tokenizer())
