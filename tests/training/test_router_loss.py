# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss of routers reaches the gradient, evens out the load, and is in no loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import family_config, write_checkpoint
from safetensors.torch import load_file, save_file
from training_runs import cut_back, figures, recipe_values, weights
from transformers import AutoModelForCausalLM

from growkit.core.errors import UsageError
from growkit.core.progress import Silent
from growkit.training import Recipe, train
from growkit.training.expert_load import choices, expert_load
from growkit.training.metrics import read_metrics
from growkit.training.read_recipe import make_recipe
from growkit.training.trainer import RunTrainer

STRONG = 0.5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose first expert is liked by the router of every layer."""
    folder = tmp_path_factory.mktemp("mixtral") / "source"
    config = family_config("mixtral", num_hidden_layers=2, vocab_size=258, num_experts_per_tok=2)
    write_checkpoint(folder, config)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            tensor[1:] *= 0.2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def recipe_of(source: Path, text: Path, **training: Any) -> Recipe:
    settings = {"schedule": "constant", "warmup_steps": 0, "decay_steps": 0, "logging_steps": 1}
    values = recipe_values(text, **{"max_steps": 1, "eval_steps": 1, **settings, **training})
    values["model"] = {"checkpoint": str(source)}
    return make_recipe(values)


def rows_with(key: str, out: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "training" / "metrics.jsonl") if key in row]


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def one_step(
    source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """The line of a step of two micro-batches with the auxiliary loss, and those batches."""
    seen: list[dict[str, Any]] = []
    compute = RunTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        seen.append({key: value.clone() for key, value in inputs.items()})
        return compute(self, model, inputs, *rest, **options)

    out = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "compute_loss", watched)
        train(recipe_of(source, text_file, router_aux_loss=STRONG, max_grad_norm=0), out)
    assert len(seen) == 2
    return rows_with("loss", out)[0], seen, out


def gradient_by_hand(
    source: Path, batches: list[dict[str, Any]], weight: float
) -> dict[str, float]:
    """Losses and the gradient's norm of mean(lm) + weight x mean(auxiliary), by torch alone."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.router_aux_loss_coef = 0.0
    found = [model(**batch, output_router_logits=True) for batch in batches]
    language = sum(result.loss for result in found) / len(found)  # as many tokens in each
    auxiliary = sum(result.aux_loss for result in found) / len(found)
    (language + weight * auxiliary).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    return {
        "loss": language.item(),
        "router_aux_loss": auxiliary.item(),
        "grad_norm": squares**0.5,
    }


def test_the_gradient_is_that_of_both_losses_and_the_loss_is_one(
    source: Path, one_step: tuple[dict[str, Any], list[dict[str, Any]], Path]
) -> None:
    row, batches, _ = one_step
    expected = gradient_by_hand(source, batches, STRONG)
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    # Negative controls: without it, and added once a micro-batch instead of once a step.
    for weight in (0.0, 2 * STRONG):
        wrong = gradient_by_hand(source, batches, weight)["grad_norm"]
        assert abs(wrong - row["grad_norm"]) > 1e-3 * row["grad_norm"]


def test_reported_losses_are_those_of_a_run_without(
    source: Path,
    text_file: Path,
    tmp_path: Path,
    one_step: tuple[dict[str, Any], list[dict[str, Any]], Path],
) -> None:
    """Bit for bit at the first step, training and held-out; afterwards the weights differ."""
    notes = Notes()
    out = train(recipe_of(source, text_file, max_grad_norm=0), tmp_path / "run", reporter=notes).out
    row = rows_with("loss", out)[0]
    assert row["loss"] == one_step[0]["loss"] and "router_aux_loss" not in row
    assert rows_with("eval_loss", out)[0] == rows_with("eval_loss", one_step[2])[0]
    assert weights(out) != weights(one_step[2])
    assert sum("training.router_aux_loss" in said for said in notes.said) == 1


@pytest.mark.parametrize("coefficient", [None, 0.0])
def test_the_folder_decides_where_the_recipe_is_silent(
    source: Path,
    text_file: Path,
    tmp_path: Path,
    coefficient: float | None,
    one_step: tuple[dict[str, Any], list[dict[str, Any]], Path],
) -> None:
    switched = tmp_path / "source"
    shutil.copytree(source, switched)
    config = json.loads((switched / "config.json").read_text())
    config |= {"output_router_logits": True, "router_aux_loss_coef": STRONG}
    (switched / "config.json").write_text(json.dumps(config))
    chosen = {} if coefficient is None else {"router_aux_loss": coefficient}
    notes = Notes()
    recipe = recipe_of(switched, text_file, max_grad_norm=0, **chosen)
    out = train(recipe, tmp_path / "run", reporter=notes).out
    row = rows_with("loss", out)[0]
    assert row["loss"] == one_step[0]["loss"]
    assert (row["grad_norm"] == one_step[0]["grad_norm"]) == (coefficient is None)
    assert ("router_aux_loss" in row) == (coefficient is None)
    assert not any("router_aux_loss" in said for said in notes.said)


def test_what_is_written_keeps_the_switch_off(
    one_step: tuple[dict[str, Any], list[dict[str, Any]], Path],
) -> None:
    """So that others' losses of the trained model are language-model losses too."""
    out = one_step[2]
    for folder in (out, out / "training" / "checkpoints" / "checkpoint-1"):
        config = json.loads((folder / "config.json").read_text())
        assert config["output_router_logits"] is False
        assert config["router_aux_loss_coef"] == 0.001


def test_loads_even_out_with_it(source: Path, text_file: Path, tmp_path: Path) -> None:
    """One expert is liked by every router; thirty steps with the auxiliary loss undo that."""
    loads = {}
    for coefficient in (0.0, STRONG):
        recipe = recipe_of(
            source, text_file, max_steps=30, router_aux_loss=coefficient, logging_steps=10,
            eval_steps=30, save_steps=30, probe_steps=30, learning_rate=1e-2,
        )  # fmt: skip
        out = train(recipe, tmp_path / str(coefficient)).out
        probes = [row["probe"] for row in rows_with("probe", out)]
        first, last = ([max(p["expert_load_max"]), min(p["expert_load_min"])] for p in probes)
        loads[coefficient] = first, last
    assert loads[0.0][0] == loads[STRONG][0]
    (most, least), (most_with, least_with) = loads[0.0][1], loads[STRONG][1]
    assert most_with < most - 0.2 and least_with > least


def test_a_resumed_run_is_the_uninterrupted_one(
    source: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(source, text_file, max_steps=4, save_steps=2, router_aux_loss=STRONG)
    whole = train(recipe, tmp_path / "whole").out
    shutil.copytree(whole, tmp_path / "cut")
    cut_back(tmp_path / "cut", 2)
    cut = train(recipe, tmp_path / "cut").out
    assert figures(cut) == figures(whole) and weights(cut) == weights(whole)
    assert all(row["router_aux_loss"] > 0 for row in rows_with("loss", cut))


def test_a_model_without_routers_is_refused(text_file: Path, tmp_path: Path) -> None:
    values = recipe_values(text_file, router_aux_loss=0.01)
    with pytest.raises(UsageError, match=r"router_aux_loss is 0\.01, and a llama"):
        train(make_recipe(values), tmp_path / "run")


def test_the_switch_of_transformers_names_the_right_key() -> None:
    values = recipe_values(Path("text"))
    values["model"] = {"checkpoint": "folder", "config": {"output_router_logits": True}}
    with pytest.raises(UsageError) as refusal:
        make_recipe(values)
    assert "training.router_aux_loss" in f"{refusal.value.cause} {refusal.value.remedy}"


def test_load_counts_choices(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad(), choices(model) as counts:
        logits = model(ids, output_router_logits=True).router_logits
    for layer, of_layer in enumerate(logits):
        chosen = of_layer.topk(2).indices.flatten().tolist()
        assert counts[layer].tolist() == [chosen.count(expert) for expert in range(4)]
    even = {0: torch.tensor([5, 5]), 1: torch.tensor([0, 8])}
    assert expert_load(even) == {"expert_load_max": [1.0, 2.0], "expert_load_min": [1.0, 0.0]}
    assert expert_load({}) == {}
