"""Slots of parameters that two processes share (FSDP2's DTensors) are those of the whole ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from grown_runs import changed, continue_recipe, grow, make_source
from process_runs import run
from test_optimizer import MAP, STEPS, Toy
from torch import nn
from training_runs import figures
from yaml import safe_dump

from growkit.training import train
from growkit.training.growth.rates import Rates
from growkit.training.growth.slots import map_slots
from growkit.training.growth.trainer_hooks import freeze_gradients, gradient_norms
from growkit.training.optimizer import GrowthOptimizer, parameter_groups
from growkit.training.recipe_training import TrainingSection

CASES = [("adamw", 0.0, 1.0), ("adamw", 0.5, 2.0), ("muon", 0.0, 1.0), ("muon", 0.5, 2.0)]


def steps_of(
    model: nn.Module, optimizer: str, rates: Rates, sharded: bool
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Whole parameters after some steps with given gradients, and the norms of the last ones."""
    from torch.distributed.tensor import distribute_tensor

    section = TrainingSection(max_steps=1, learning_rate=0.01, optimizer=optimizer)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    slots = map_slots(MAP, shapes)
    groups = parameter_groups(model, section, slots)
    made = GrowthOptimizer(groups, section, slots, lambda: rates)
    norms: list[float] = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            grad = torch.randn(tuple(parameter.shape), generator=generator)
            if sharded:
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
            parameter.grad = grad
        freeze_gradients(made, rates)
        norms = [gradient_norms(made)[part].item() for part in ("old", "new")]
        made.step()
    whole = {
        name: (p.full_tensor() if sharded else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return whole, norms


def compare_sharded(arguments: Sequence[str]) -> int:
    """In each of two processes: every case sharded and whole."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for optimizer, old, new in CASES:
        torch.manual_seed(0)
        whole = Toy()
        torch.manual_seed(0)
        sharded = fully_shard(Toy(), mesh=mesh)
        rates = Rates(old, new)
        expected, norms = steps_of(whole, optimizer, rates, sharded=False)
        found, sharded_norms = steps_of(sharded, optimizer, rates, sharded=True)
        assert sharded_norms == pytest.approx(norms, rel=1e-5)
        for name, value in expected.items():
            # AdamW is entrywise. Muon multiplies matrices in bfloat16, in another order.
            tolerance = 0.0 if optimizer == "adamw" or "weight" not in name else 2e-3
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def test_sharded_parameters_as_whole_ones() -> None:
    run(2, [], compare_sharded)


def test_frozen_bytes_under_two_processes(text_file: Path, tmp_path: Path) -> None:
    """DDP: the old bytes stay, and the run is that of one process."""
    source = make_source(text_file, tmp_path / "base")
    grown = grow(source, tmp_path / "grown", hidden="x2", signal_heads="x2")
    recipe = continue_recipe(
        text_file, grown, train={"new_then_all": 4}, save_steps=2, logging_steps=1
    )
    (tmp_path / "recipe.yaml").write_text(safe_dump(recipe.to_dict()))
    run(2, ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "two")])
    train(recipe, tmp_path / "one")
    for first, second in zip(figures(tmp_path / "two"), figures(tmp_path / "one"), strict=True):
        for name in ("step", "loss", "eval_loss", "grad_norm_old", "grad_norm_new"):
            assert first.get(name) == pytest.approx(second.get(name), abs=1e-4)
    frozen = changed(grown, tmp_path / "two/training/checkpoints/checkpoint-4")
    assert sum(old for old, _ in frozen.values()) == 0 < sum(new for _, new in frozen.values())
    thawed = changed(grown, tmp_path / "two")
    assert sum(old for old, _ in thawed.values()) > 0
