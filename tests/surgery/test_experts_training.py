"""What training sees of experts: who gets other gradients, who never does, what the router gets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from expert_checkpoints import source_folder
from transformers import AutoModelForCausalLM


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def batches(steps: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield torch.randint(256, (4, 24), generator=generator)


def train(model: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for ids in batches(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def spread(weight: torch.Tensor, old: int) -> float:
    """Largest distance between an expert and its copies, relative to the largest entry.

    ``weight``: [copies x old experts, rows, columns], copies one whole set after the other.
    """
    weight = weight.detach()
    sets = weight.view(-1, old, *weight.shape[1:])
    return float((sets - sets[:1]).abs().max() / weight.abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_random_router_makes_equal_experts_different(tmp_path: Path, family: str) -> None:
    tiny.grow(source_folder(tmp_path / "a", family), tmp_path / "b", experts="4")
    model = model_of(tmp_path / "b")
    experts = [layer.mlp.experts for layer in model.model.layers]
    assert all(spread(e.gate_up_proj, 1) == spread(e.down_proj, 1) == 0 for e in experts)
    train(model, 5)
    for e in experts:
        assert spread(e.gate_up_proj, 1) > 0.01 and spread(e.down_proj, 1) > 0.01


@pytest.mark.parametrize("symmetry", ["split", "noise", "even"])
def test_copies_of_experts_part_unless_they_are_equal(tmp_path: Path, symmetry: str) -> None:
    source = source_folder(tmp_path / "a", "mixtral")
    tiny.grow(source, tmp_path / "b", experts="x2", symmetry=symmetry)
    model = model_of(tmp_path / "b")
    moe = model.model.layers[0].mlp
    assert spread(moe.experts.gate_up_proj, 4) == 0
    assert (spread(moe.experts.down_proj, 4) > 0.1) == (symmetry != "even")
    train(model, 5)
    parted = spread(moe.experts.gate_up_proj, 4), spread(moe.gate.weight[..., None], 4)
    if symmetry == "even":
        # Nothing but rounding, which AdamW may enlarge a little.
        assert max(parted) < 3e-3
    else:
        assert min(parted) > 0.01


@pytest.mark.parametrize("per_token", [1, 2])
def test_the_router_learns_from_the_loss_only_with_two_experts(
    tmp_path: Path, per_token: int
) -> None:
    """One renormalised weight is always 1: what the plan warns of."""
    source = source_folder(tmp_path / "a", "llama")
    plan = tiny.grow(source, tmp_path / "b", experts="4", experts_per_token=per_token)
    warned = any("the router gets no gradient" in warning for warning in plan.warnings)
    assert warned == (per_token == 1)
    model = model_of(tmp_path / "b")
    # Experts that have parted already: equal ones give the router nothing to choose.
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        down = layer.mlp.experts.down_proj
        down.data += 0.05 * torch.randn(down.shape, generator=generator)
    for ids in batches(1):
        model(input_ids=ids, labels=ids).loss.backward()
    largest = max(float(layer.mlp.gate.weight.grad.abs().max()) for layer in model.model.layers)
    assert (largest < 1e-7) == (per_token == 1)


def test_the_auxiliary_loss_grows_with_the_copies(tmp_path: Path) -> None:
    """What the plan says of it: the same routing counts r times."""
    source = source_folder(tmp_path / "a", "qwen3_moe")
    plan = tiny.grow(source, tmp_path / "b", experts="x3", symmetry="even")
    assert any("3 times as large" in warning for warning in plan.warnings)
    losses = []
    for folder in (source, tmp_path / "b"):
        with torch.no_grad():
            found = model_of(folder)(input_ids=next(batches(1)), output_router_logits=True)
        losses.append(float(found.aux_loss))
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-4)
