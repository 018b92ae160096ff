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


# -- rates that follow the size --------------------------------------------------------------------

WIDTHS = (64, 192)


def wide(width: int, layers: int = 2, **changes: Any) -> dict[str, Any]:
    """A Llama whose heads stay 16 wide."""
    return {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 32,
        "head_dim": 16,
        "tie_word_embeddings": False,
        "initializer_range": 0.125,
        **changes,
    }


def moved(config: dict[str, Any], base: dict[str, Any], **training: Any) -> dict[str, float]:
    """Root mean square of the change of logits and of the final hidden state by 5 steps."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from growkit.training.growth.rates import Rates
    from growkit.training.growth.slots import SlotMap
    from growkit.training.models import scale_starts
    from growkit.training.optimizer import GrowthOptimizer, parameter_groups
    from growkit.training.rate_rule import rate_factors

    section = {"max_steps": 5, "weight_decay": 0.0, "learning_rate": 4e-3, **training}
    if section.get("rate_rule", "standard") != "standard":
        section["rate_base"] = {k: v for k, v in base.items() if k != "model_type"}
    recipe = make_recipe(
        {
            "model": {"config": config},
            "tokenizer": {"bytes": True},
            "data": {"files": "sample", "sequence_length": 16},
            "training": section,
        }
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    scale_starts(model, recipe)
    slots = SlotMap({})
    groups = parameter_groups(
        model, recipe.training, slots, rate_factors(recipe, model.config.to_dict())
    )
    optimizer = GrowthOptimizer(groups, recipe.training, slots, lambda: Rates(1.0, 1.0))
    ids = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(1))

    def outputs() -> dict[str, Any]:
        with torch.no_grad():
            made = model(ids, output_hidden_states=True)
        return {"logits": made.logits, "hidden": made.hidden_states[-2]}

    before = outputs()
    for _ in range(5):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return {
        name: float((value - before[name]).square().mean().sqrt())
        for name, value in outputs().items()
    }


def slope(figures: list[dict[str, float]], name: str, ratio: float) -> float:
    """Exponent of the change in the size: 0 where it is flat."""
    import math

    return math.log(figures[-1][name] / figures[0][name], ratio)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_coordinates_are_flat_across_width_under_the_rule(optimizer: str) -> None:
    """The coordinate check of arXiv:2203.03466, and its negative control."""
    base = wide(WIDTHS[0])
    slopes = {}
    for rule in ("standard", "mup"):
        figures = [
            moved(wide(width), base, rate_rule=rule, optimizer=optimizer) for width in WIDTHS
        ]
        slopes[rule] = {
            name: slope(figures, name, WIDTHS[-1] / WIDTHS[0]) for name in ("logits", "hidden")
        }
    # Logits fall a little at these widths: the output matrix starts at 1 / width, steps are few.
    assert abs(slopes["mup"]["hidden"]) < 0.2 and -0.5 < slopes["mup"]["logits"] < 0.2, slopes
    assert slopes["standard"]["hidden"] > 0.4 and slopes["standard"]["logits"] > 0.4, slopes


def test_coordinates_are_flat_across_depth_under_completep() -> None:
    base = wide(64, 2)
    slopes = {}
    for rule in ("mup", "completep"):
        figures = [moved(wide(64, layers), base, rate_rule=rule) for layers in (2, 12)]
        slopes[rule] = slope(figures, "hidden", 12 / 2)
    assert abs(slopes["completep"]) < 0.3 and slopes["mup"] > slopes["completep"] + 0.3, slopes


def test_factors_by_axes() -> None:
    """A tensor's factor is that of the axes that it reads; relative to the first stage's model."""
    from growkit.families import family_of
    from growkit.training.rate_rule import tensor_factors
    from growkit.training.recipe_training import TrainingSection

    family = family_of(wide(64))
    base, large = family.sizes(wide(64)), family.sizes(wide(256, 8))
    section = TrainingSection(max_steps=1, rate_rule="completep")
    found = {t.role: tensor_factors(t, large, base, section) for t in family.present(large)}
    assert found["embed"].adamw == found["input_norm"].adamw == 1.0
    assert found["q"].adamw == found["gate"].adamw == 1 / 4 and found["q"].start == 1 / 2
    assert found["lm_head"].adamw == found["lm_head"].start == 1 / 4
    assert found["o"].adamw == found["down"].adamw == 1 / 16  # 4 x as wide, 4 x as deep
    assert found["q"].muon == 1 / 2  # update of entries of one size: spectral norm x 2


def test_no_base_is_refused(text_file: Path, tmp_path: Path) -> None:
    from growkit.core.errors import UsageError

    plain = values(text_file, 1, rate_rule="mup")
    del plain["stages"]
    with pytest.raises(UsageError, match="needs to know the size"):
        train(make_recipe(plain), tmp_path / "run")


def test_a_staged_run_takes_its_first_model_as_the_base(text_file: Path, tmp_path: Path) -> None:
    staged = values(text_file, 1, rate_rule="completep")
    train(make_recipe(staged), tmp_path / "run")
    from growkit.training.rate_rule import rate_factors
    from growkit.training.read_recipe import load_recipe

    stages = tmp_path / "run" / "training" / "stages"
    first, second = (load_recipe(stages / n / "training" / "recipe.yaml") for n in ("0", "1"))
    config = json.loads((stages / "1-grown" / "config.json").read_text())
    before = json.loads((stages / "0" / "config.json").read_text())
    assert {f.adamw for f in rate_factors(first, before).values()} == {1.0}
    factors = rate_factors(second, config)
    assert factors["model.layers.0.mlp.down_proj.weight"].adamw == pytest.approx(1 / 3)
    assert factors["model.layers.0.mlp.up_proj.weight"].adamw == 1.0
