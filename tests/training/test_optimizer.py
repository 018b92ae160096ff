"""Every slot gets, bit for bit, the step that torch's optimizer takes at that slot's rate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training_runs import make

from growkit.advice.facts import new_entries
from growkit.core.errors import UsageError
from growkit.training.growth.rates import Rates
from growkit.training.growth.slots import SlotMap, map_slots
from growkit.training.growth.trainer_hooks import freeze_gradients, gradient_norms
from growkit.training.optimizer import GrowthOptimizer, library_optimizer, parameter_groups

STEPS = 7
MAP = {
    "inserted.weight": "all",
    "grown.weight": {"rows": [[2, 5], [7, 8]], "columns": [[4, 6]]},
    "rows.weight": {"rows": [[6, 8]]},
    "columns.weight": {"columns": [[0, 3]]},
    "norm": {"rows": [[1, 3]]},
}


class Toy(nn.Module):
    """Every kind of parameter that a growth leaves behind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        for name in ("old", "inserted", "grown", "rows", "columns"):
            setattr(self, name, nn.Linear(6, 8, bias=False))
        self.norm = nn.Parameter(torch.ones(6))
        self.lambda_q1 = nn.Parameter(torch.ones(4))


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        part: Any = MAP.get(name, {})
        mask = torch.zeros(parameter.shape, dtype=torch.bool)
        for index in torch.nonzero(torch.ones(parameter.shape)):
            inside = [
                any(a <= index[dim] < b for a, b in (part.get(label, []) if part != "all" else []))
                for dim, label in enumerate(("rows", "columns")[: parameter.ndim])
            ]
            mask[tuple(index)] = part == "all" or any(inside)
        found[name] = mask
    return found


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def library_run(model: nn.Module, section: Any, factor: float, frozen: torch.Tensor | None) -> Any:
    """torch's optimizers over whole parameters, all at one rate; the oracle of a slot."""
    model = copy.deepcopy(model)
    mask = masks(model)
    groups = parameter_groups(model, section, SlotMap({}))
    optimizers = []
    for kind in sorted({g["kind"] for g in groups}):
        chosen = [{**g, "lr": section.learning_rate * factor} for g in groups if g["kind"] == kind]
        for group in chosen:
            group["lr"] *= group["multiplier"]
        optimizers.append(library_optimizer(kind, chosen, section))
    for step in range(STEPS):
        gradients(model, step)
        if frozen is not None:
            for name, parameter in model.named_parameters():
                parameter.grad.masked_fill_(mask[name] == frozen, 0.0)
        for optimizer in optimizers:
            optimizer.step()
    return dict(model.named_parameters())


def growth_optimizer(
    model: nn.Module, section: Any, rates: Rates, new: dict[str, Any] | None = None
) -> GrowthOptimizer:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    slots = map_slots(MAP if new is None else new, shapes)
    groups = parameter_groups(model, section, slots)
    return GrowthOptimizer(groups, section, slots, lambda: rates)


def toy(dtype: torch.dtype) -> Toy:
    torch.manual_seed(0)
    return Toy().to(dtype)


def section_of(text_file: Path, **changes: Any) -> Any:
    return make(text_file, **{"lambda_learning_rate_multiplier": 3.0, **changes}).training


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rates", [Rates(1, 1), Rates(0.1, 2), Rates(0, 1), Rates(0, 3), Rates(1, 0)], ids=str
)
def test_each_slot_is_the_librarys_at_its_rate(
    kind: str, dtype: torch.dtype, rates: Rates, text_file: Path
) -> None:
    section, model = section_of(text_file, optimizer=kind), toy(dtype)
    start = copy.deepcopy(dict(model.named_parameters()))
    frozen = None
    if 0 in (rates.old, rates.new):
        frozen = torch.tensor(rates.new == 0)
    expected = {
        True: library_run(model, section, rates.new, frozen),
        False: library_run(model, section, rates.old, frozen),
    }
    optimizer = growth_optimizer(model, section, rates)
    for step in range(STEPS):
        gradients(model, step)
        freeze_gradients(optimizer, rates)
        optimizer.step()
    for name, mask in masks(model).items():
        got = bits(dict(model.named_parameters())[name])
        for part, rate in ((True, rates.new), (False, rates.old)):
            slots = mask == part
            reference = expected[part][name] if rate else start[name]
            assert torch.equal(got[slots], bits(reference)[slots]), (name, part)
            if rate and slots.any() and dtype == torch.float32:  # bfloat16 rounds 1 + 0.001
                assert not torch.equal(got[slots], bits(start[name])[slots]), (name, part)
    kinds = {name: g["kind"] for g in optimizer.param_groups for name in g["param_names"]}
    assert {n for n, k in kinds.items() if k == "muon"} == (
        {f"{n}.weight" for n in ("old", "inserted", "grown", "rows", "columns")}
        if kind == "muon"
        else set()
    )


def test_a_gradient_scale_is_no_learning_rate(text_file: Path) -> None:
    """Negative control: under Adam, slots with a scaled gradient move as fast as the others."""
    section = section_of(text_file, weight_decay=0.0)
    moved = []
    for scale in (1.0, 0.1):
        model = toy(torch.float32)
        optimizer = growth_optimizer(model, section, Rates(1, 1))
        before = model.old.weight.detach().clone()
        for step in range(STEPS):
            gradients(model, step)
            model.old.weight.grad *= scale
            optimizer.step()
        moved.append((model.old.weight - before).abs().mean().item())
    assert moved[1] == pytest.approx(moved[0], rel=1e-3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_without_the_map_frozen_slots_move(kind: str, text_file: Path) -> None:
    """Negative control of the freezing: the same rates, and a map that forgets one parameter."""
    section, model = section_of(text_file, optimizer=kind), toy(torch.float32)
    before = model.grown.weight.detach().clone()
    forgetful = {**MAP, "grown.weight": "all"}
    optimizer = growth_optimizer(model, section, Rates(0, 1), forgetful)
    gradients(model, 0)
    optimizer.step()
    assert bool((model.grown.weight != before).all())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_saved_and_loaded_goes_on_bit_for_bit(
    kind: str, text_file: Path, tmp_path: Path
) -> None:
    section, rates = section_of(text_file, optimizer=kind), Rates(0.5, 2)

    def run(model: nn.Module, optimizer: GrowthOptimizer, first: int, last: int) -> None:
        for step in range(first, last):
            gradients(model, step)
            optimizer.step()

    whole = toy(torch.float32)
    run(whole, growth_optimizer(whole, section, rates), 0, 6)
    model = toy(torch.float32)
    optimizer = growth_optimizer(model, section, rates)
    run(model, optimizer, 0, 3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = growth_optimizer(model, section, rates)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    run(model, again, 3, 6)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True)
    )
    names = [name for group in again.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    fresh = growth_optimizer(model, section, rates)
    run(model, fresh, 3, 6)
    assert not torch.equal(whole.old.weight, model.old.weight)  # negative control


def test_gradient_norms_of_both_parts(text_file: Path) -> None:
    model = toy(torch.float32)
    optimizer = growth_optimizer(model, section_of(text_file), Rates(1, 1))
    gradients(model, 0)
    expected = {"old": 0.0, "new": 0.0}
    for name, mask in masks(model).items():
        grad = dict(model.named_parameters())[name].grad
        assert grad is not None
        for index in torch.nonzero(torch.ones(grad.shape)):
            part = "new" if mask[tuple(index)] else "old"
            expected[part] += grad[tuple(index)].item() ** 2
    norms = gradient_norms(optimizer)
    for part, total in expected.items():
        assert norms[part].item() == pytest.approx(total**0.5, rel=1e-5)
    whole = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert sum(expected.values()) == pytest.approx(whole.item() ** 2, rel=1e-5)


def test_frozen_gradients_take_no_part_in_clipping(text_file: Path) -> None:
    model = toy(torch.float32)
    optimizer = growth_optimizer(model, section_of(text_file), Rates(0, 1))
    gradients(model, 0)
    before = gradient_norms(optimizer)["new"]
    freeze_gradients(optimizer, Rates(0, 1))
    assert model.old.weight.grad is None
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(norm, before)
    assert gradient_norms(optimizer)["old"] == 0


LABELS = {1: ("rows",), 2: ("rows", "columns"), 3: ("experts", "rows", "columns")}


@st.composite
def shapes_and_ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, Any]]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    part: dict[str, Any] = {}
    for label, size in zip(LABELS[len(shape)], shape, strict=True):
        cuts = sorted(draw(st.sets(st.integers(0, size), max_size=6)))
        part[label] = [[a, b] for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    return shape, part


@given(shapes_and_ranges())
def test_masks_and_counts_are_those_of_single_entries(
    case: tuple[tuple[int, ...], dict[str, Any]],
) -> None:
    """The vectors, broadcast, and the closed count, against every entry by itself."""
    shape, part = case
    expected = torch.zeros(shape, dtype=torch.bool)
    for index in torch.nonzero(torch.ones(shape)):
        expected[tuple(index)] = any(
            start <= index[dimension] < end
            for dimension, label in enumerate(LABELS[len(shape)])
            for start, end in part[label]
        )
    mask = map_slots({"w": part}, {"w": shape}).slots("w").mask()
    assert torch.equal(mask, expected)
    assert new_entries(shape, part) == int(expected.sum())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"absent.weight": "all"}, "lists 'absent.weight' as new.*no such parameter"),
        ({"grown.weight": {"rows": [[7, 9]]}}, "rows 7 to 9 of 'grown.weight'.*has 8"),
    ],
)
def test_map_of_another_model(part: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        map_slots(part, {name: tuple(p.shape) for name, p in Toy().named_parameters()})
