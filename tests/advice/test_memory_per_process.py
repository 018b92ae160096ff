"""The closed formula of memory against the bytes of real parameters, gradients and states."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from family_checkpoints import FAMILIES, family_config, write_checkpoint
from torch import Tensor

from growkit.advice.facts import Facts, facts_of_recipe, new_entries
from growkit.advice.memory import TrainingSetup, training_memory
from growkit.training.growth.slots import SlotMap, local
from growkit.training.growth.trainer_hooks import GrowthTraining
from growkit.training.models import build_model
from growkit.training.optimizer import parameter_groups
from growkit.training.read_recipe import make_recipe
from growkit.training.recipe import Recipe


def nbytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown")
    tiny.make_folder(folder / "source", tiny.gda_config(4, 2, 1, tie_word_embeddings=True), "BF16")
    tiny.grow(folder / "source", folder / "grown", signal_heads="x2", ffn="x1.5", layers="+1")
    return folder / "grown"


def recipe_of(folder: Path, dtype: str, **training: Any) -> Recipe:
    return make_recipe(
        {
            "model": {"checkpoint": str(folder), "dtype": dtype},
            "data": {"files": "sample", "sequence_length": 8},
            "training": {"max_steps": 100, **training},
        }
    )


def facts_of(recipe: Recipe) -> Facts:
    facts = facts_of_recipe(recipe)
    assert facts is not None
    return facts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize(
    "training", [{}, {"optimizer": "muon"}, {"train": "new"}, {"train": "new", "optimizer": "muon"}]
)
def test_one_process_holds_what_the_formula_says(
    dtype: str, training: dict[str, Any], grown: Path
) -> None:
    recipe = recipe_of(grown, dtype, **training)
    model = build_model(recipe.model, range(256), 0)
    growth = GrowthTraining(model, recipe, lambda: 0)
    ids = torch.arange(16).reshape(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    growth.after_backward()
    growth.optimizer.step()
    parameters = list(model.parameters())
    states = [
        value
        for state in growth.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    facts = facts_of(recipe)
    memory = training_memory(facts.shapes, facts.new, facts.setup)
    assert memory.weights == nbytes(parameters)
    assert memory.gradients == nbytes(p.grad for p in parameters if p.grad is not None)
    assert memory.optimizer == nbytes(states)
    assert memory.total == memory.weights + memory.gradients + memory.optimizer
    everything = training_memory(facts.shapes, {}, facts.setup)
    assert (everything.gradients == memory.gradients) == ("train" not in training)  # control


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_muon_takes_the_same_matrices_in_every_family(family: str, tmp_path: Path) -> None:
    """The formula knows names on the disk, the optimizer modules; step counters aside."""
    write_checkpoint(tmp_path / "m", family_config(family))
    recipe = recipe_of(tmp_path / "m", "float32", optimizer="muon")
    model = build_model(recipe.model, range(256), 0)
    groups = parameter_groups(model, recipe.training, SlotMap({}))
    expected = sum(
        parameter.numel() * 4 * (1 if group["kind"] == "muon" else 2)
        for group in groups
        for _, parameter in group["params"]
    )
    facts = facts_of(recipe)
    memory = training_memory(facts.shapes, facts.new, facts.setup)
    assert 0 < memory.optimizer - expected <= 4 * len(facts.shapes)


@pytest.fixture
def fake_processes() -> Any:
    """Four processes of which only this one exists; collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield 4
    torch.distributed.destroy_process_group()


def test_fsdp_shards_by_rows(fake_processes: int, grown: Path) -> None:
    """Rows do not divide evenly (18 of the FFN), and the first process has the most of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    recipe = recipe_of(grown, "float32")
    model = build_model(recipe.model, range(256), 0)
    whole = {name: tuple(p.shape) for name, p in model.named_parameters()}
    mesh = init_device_mesh("cpu", (fake_processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    setup = TrainingSetup(strategy="fsdp", processes=fake_processes)
    memory = training_memory(whole, {}, setup)
    assert memory.weights == nbytes(local(p) for p in model.parameters())
    assert memory.gradients == memory.weights
    assert any(shape[0] % fake_processes for shape in whole.values())
    assert memory.weights * fake_processes > nbytes(torch.empty(s) for s in whole.values())


def test_what_is_gathered_and_doubled() -> None:
    """By hand: two layers of 4 x 6 and 2 x 6 entries, an embedding of 8 x 6, bfloat16 copies."""
    shapes = {"m.embed.weight": (8, 6), "m.layers.0.w": (4, 6), "m.layers.1.w": (2, 6)}
    total = (48 + 24 + 12) * 4
    one = training_memory(shapes, {}, TrainingSetup(bf16_autocast=True))
    assert (one.weights, one.gradients, one.optimizer) == (total, total, 2 * total + 3 * 4)
    assert (one.autocast, one.buckets, one.gathered) == (total // 2, 0, 0)
    ddp = training_memory(shapes, {}, TrainingSetup(processes=3))
    assert (ddp.buckets, ddp.gathered, ddp.weights) == (total, 0, total)
    fsdp = training_memory(shapes, {}, TrainingSetup(strategy="fsdp", processes=3))
    assert fsdp.weights == (3 * 6 + 2 * 6 + 1 * 6) * 4
    assert (fsdp.buckets, fsdp.gathered) == (0, (48 + 24) * 4)
    assert training_memory(shapes, {}, TrainingSetup(strategy="fsdp")).gathered == 0


def test_new_entries_are_counted_once() -> None:
    """Entries that are in a new row and in a new column; against a mask entry by entry."""
    part = {"rows": [[1, 3]], "columns": [[0, 2], [5, 6]]}
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1:3], mask[:, 0:2], mask[:, 5:6] = True, True, True
    assert new_entries((4, 6), part) == int(mask.sum())
    assert new_entries((4,), {"rows": [[3, 4]]}) == 1
    assert new_entries((4, 6), "all") == 24
    assert new_entries((3, 4, 6), {"experts": [[1, 2]]}) == 24


def test_no_process_of_a_planned_launch_holds_a_model_of_70_billion() -> None:
    """Llama 3 70B in 64 processes; a recipe's ``parallel.processes`` plans it (--dry-run)."""
    layer = {
        "self_attn.q_proj": (8192, 8192), "self_attn.k_proj": (1024, 8192),
        "self_attn.v_proj": (1024, 8192), "self_attn.o_proj": (8192, 8192),
        "mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192),
        "mlp.down_proj": (8192, 28672), "input_layernorm": (8192,),
        "post_attention_layernorm": (8192,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{name}.weight": shape for i in range(80) for name, shape in layer.items()
    }
    shapes |= {f"{n}.weight": (128256, 8192) for n in ("model.embed_tokens", "lm_head")}
    whole = 4 * sum(prod(shape) for shape in shapes.values())
    setup = TrainingSetup(
        strategy="fsdp", processes=64, bf16_autocast=True, tokens=4096, checkpointing=True
    )
    memory = training_memory(shapes, {}, setup)
    assert whole > 280e9 and memory.weights == memory.gradients == pytest.approx(whole / 64)
    assert memory.activations < 20e9 and memory.peak < 0.25 * whole
    assert training_memory(shapes, {}, replace(setup, strategy="ddp")).peak > 5 * whole


def test_what_two_processes_took_was_predicted() -> None:
    """benchmarks/sharded_memory.py measured it."""
    path = Path(__file__).parents[2] / "benchmarks" / "sharded_memory.json"
    cases = json.loads(path.read_text())["cases"]
    assert "weights" in cases
    for name, case in cases.items():
        assert 1 / 1.2 < case["predicted"]["peak"] / case["measured"] < 1.2, name
