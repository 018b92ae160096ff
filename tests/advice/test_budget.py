"""Tokens, FLOPs and hours, against counted ones; where the tokens of a base come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from growkit.advice import Throughput, advise, facts_of_recipe
from growkit.advice.budget import training_flops_per_token
from growkit.advice.facts import Facts
from growkit.cli.main import main
from growkit.record.manifest import trained_tokens
from growkit.training.growth.grown import tokens_with_source
from growkit.training.growth.trainer_hooks import GrowthTraining
from growkit.training.models import build_model
from growkit.training.read_recipe import make_recipe
from growkit.training.recipe import Recipe


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown")
    tiny.make_folder(folder / "source", tiny.llama_config())
    tiny.grow(folder / "source", folder / "grown", layers="+2", layer_placement="end")
    return folder / "grown"


def recipe_of(checkpoint: Path, **training: Any) -> Recipe:
    return make_recipe(
        {
            "model": {"checkpoint": str(checkpoint)},
            "data": {"files": "sample", "sequence_length": 16},
            "training": {"max_steps": 100, "per_device_train_batch_size": 4, **training},
        }
    )


def facts_of(recipe: Recipe) -> Facts:
    facts = facts_of_recipe(recipe)
    assert facts is not None
    return facts


def counted(recipe: Recipe) -> tuple[int, int]:
    """FLOPs of matrix products of a forward pass, and of forward and backward, by torch."""
    model = build_model(recipe.model, range(256), 0)
    model.set_attn_implementation("eager")
    GrowthTraining(model, recipe, lambda: 0)
    ids = torch.arange(16)[None]
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(input_ids=ids)
    with FlopCounterMode(display=False) as both:
        model(input_ids=ids, labels=ids).loss.backward()
    return forward.get_total_flops(), both.get_total_flops()


def test_a_training_step_is_three_forward_passes(grown: Path) -> None:
    recipe = recipe_of(grown)
    facts = facts_of(recipe)
    forward, both = counted(recipe)
    assert both == 3 * forward
    assert training_flops_per_token(facts) == 3 * facts.flops_per_token
    recomputing = facts_of(recipe_of(grown, gradient_checkpointing=True))
    assert training_flops_per_token(recomputing) == 4 * facts.flops_per_token


def test_frozen_matrices_need_no_weight_gradient(grown: Path) -> None:
    """An upper bound: torch also leaves out the input gradients below the first new layer."""
    recipe = recipe_of(grown, train="new")
    facts = facts_of(recipe)
    forward, both = counted(recipe)
    estimate = training_flops_per_token(facts)
    assert estimate is not None and facts.flops_per_token is not None
    assert both / forward < estimate / facts.flops_per_token < 3


def test_milestones_and_hours(grown: Path) -> None:
    recipe = recipe_of(
        grown, warmup_steps=10, train={"new_then_all": 20}, old_warmup_steps=5, adam_beta2=0.9
    )
    facts = facts_of(recipe)
    advice = advise(facts, Throughput(tokens_per_second=100.0))
    assert advice.budget.tokens == 100 * 4 * 16
    assert advice.budget.settled_tokens == (20 + 5 + 30) * 64
    layer = sum(p for n, p in sizes(grown).items() if n.startswith("model.layers.3."))
    assert facts.new_parameters == 2 * layer and advice.budget.compare_tokens == 40 * layer
    assert advice.budget.hours == pytest.approx(6400 / 100 / 3600)
    by_flops = advise(facts, Throughput(flops_per_second=1e6)).budget
    assert by_flops.flops is not None
    assert by_flops.hours == pytest.approx(by_flops.flops / 1e6 / 3600)
    assert advise(facts).budget.hours is None


def sizes(folder: Path) -> dict[str, int]:
    return {name: tensor.size for name, tensor in tiny.read_folder(folder).items()}


def test_tokens_of_the_base_come_from_its_records(grown: Path, tmp_path: Path) -> None:
    assert trained_tokens(grown) is None
    recipe = recipe_of(grown)
    assert tokens_with_source(recipe, 7) is None
    told = recipe.model.model_copy(update={"trained_tokens": 100})
    assert tokens_with_source(recipe.model_copy(update={"model": told}), 7) == 107
    source = tiny.make_folder(tmp_path / "source", tiny.llama_config())
    (source / "growkit_training.json").write_text(json.dumps({"trained_tokens": 5_000_000}))
    assert trained_tokens(source) == 5_000_000
    tiny.grow(source, tmp_path / "grown", ffn="x2")
    assert trained_tokens(tmp_path / "grown") == 5_000_000
    tiny.grow(tmp_path / "grown", tmp_path / "again", layers="+1")
    assert trained_tokens(tmp_path / "again") == 5_000_000
    facts = facts_of(recipe_of(tmp_path / "grown"))
    base = sum(sizes(source).values())
    assert facts.base_parameters == base
    assert advise(facts).to_dict()["tokens_per_parameter"] == pytest.approx(5_000_000 / base)


def test_plan_prints_it(grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: {{checkpoint: {grown}}}\ndata: {{files: sample, sequence_length: 16}}\n"
        "training: {max_steps: 10, optimizer: muon}\n"
    )
    arguments = ["plan", str(grown), "--ffn", "x2", "--trained-tokens", "1e9"]
    arguments += ["--train-recipe", str(tmp_path / "run.yaml"), "--tokens-per-second", "1000"]
    assert main([*arguments, "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert advice["trained_tokens"] == 1_000_000_000 and advice["tokens"] == 10 * 8 * 16
    assert advice["setup"]["optimizer"] == "muon"
    assert "over-trained" in {finding["name"] for finding in advice["findings"]}
    assert main(arguments) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "Muon + AdamW",
        "over-trained",
        "1.000 B tokens seen",
        "per new parameter",
        "hours",
    ):
        assert part in text
    assert "[arXiv:2510.06548; G_stack arXiv:2405.15319" in text


def test_train_says_it_before_the_first_step(
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the run is refused right after: the data do not exist."""
    (tmp_path / "run.yaml").write_text(
        f"model: {{checkpoint: {grown}}}\ndata: {{files: [absent.txt]}}\n"
        "training: {max_steps: 10, train: new, learning_rate: 1.0e-3}\n"
    )
    arguments = ["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--flops-per-second", "1e9"]) == 2
    text = " ".join(capsys.readouterr().err.split())
    for part in ("memory per process: ", "new parameters: ", "hours: ", "LLaMA-Pro issue 29"):
        assert part in text
    assert main([*arguments, "--json"]) == 2
    assert "memory per process" not in capsys.readouterr().err
