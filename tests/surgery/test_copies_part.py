"""After 20 training steps no two copies are equal, unless the plan says so: every operator."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import family_checkpoints as families
import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from transformers import AutoModelForCausalLM

import growkit.modeling  # noqa: F401  (registers the gda model)
from growkit.checkpoint import open_checkpoint
from growkit.diff.folders import diff_checkpoints
from growkit.record.plan_report import plan_report
from growkit.surgery.axis_map import NEW
from growkit.surgery.plan import Plan
from growkit.verification import verify_checkpoints

GDA = tiny.gda_config(4, 2, 1, hidden_size=32, intermediate_size=24, head_dim=8)
LLAMA = tiny.llama_config(4, 2, hidden_size=32, intermediate_size=24, head_dim=8)
Case = tuple[Any, dict[str, Any]]
# Every operator that copies.
COPIES: dict[str, Case] = {
    "signal": (GDA, {"signal_heads": "x2"}),
    "noise to 1:1": (GDA, {"noise_heads": "x2"}),
    "uniform": (GDA, {"uniform_heads": "x2"}),
    "pairs": (GDA, {"kv_heads": "x2"}),
    "query": (LLAMA, {"query_heads": "x2"}),
    "kv": (LLAMA, {"kv_heads": "x2"}),
    "heads": (LLAMA, {"heads": "x2"}),
    "ffn": (LLAMA, {"ffn": "x2"}),
    "hidden": (LLAMA, {"hidden": "x2"}),
    "hidden, tied": ({**LLAMA, "tie_word_embeddings": True}, {"hidden": "x2"}),
    "experts of experts": ("mixtral", {"experts": "x2"}),
    "experts of an FFN": ("llama", {"experts": "4"}),
    "all": (GDA, {"signal_heads": "x2", "kv_heads": "x2", "ffn": "x2", "hidden": "x2"}),
}
PAST = (GDA, {"noise_heads": "x4"})  # 4 signal and 8 noise heads: two of each map


def source_of(path: Path, made_of: Any) -> Path:
    if isinstance(made_of, str):
        return families.write_checkpoint(path, families.family_config(made_of))
    return tiny.make_folder(path, made_of)


def trained(folder: Path, steps: int = 20) -> Path:
    """The folder after some steps of AdamW on random text."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        ids = torch.randint(256, (2, 12))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "trained")
    return folder / "trained"


def closest_copies(plan: Plan, folder: Path) -> dict[str, float]:
    """Role of a matrix -> smallest distance between two copies in it, relative to their size."""
    tensors = tiny.read_folder(folder)
    closest: dict[str, float] = {}

    def see(role: str, a: Any, b: Any) -> None:
        distance = float(np.abs(a - b).max() / np.abs(a).max())
        closest[role] = min(distance, closest.get(role, np.inf))

    experts: dict[tuple[str, int | None, str | None], list[Any]] = {}
    for tensor in plan.tensors:
        values = tensors[tensor.output.name].astype(np.float64)
        if tensor.expert is not None:
            experts.setdefault((tensor.role, tensor.layer, tensor.source), []).append(values)
        for dimension, dim in enumerate(tensor.dims):
            if dim is None or dim.consumes or values.ndim < 2:
                continue  # two gains may meet by chance
            units = np.moveaxis(values, dimension, 0).reshape(len(dim.source), -1)
            for unit in np.unique(dim.source[(dim.source != NEW) & (dim.multiplicity > 1)]):
                for a, b in combinations(units[dim.source == unit], 2):
                    see(tensor.role, a, b)
    for (role, _, _), copies in experts.items():
        for a, b in combinations(copies, 2):
            see(role, a, b)
    return closest


@pytest.mark.parametrize("name", COPIES)
def test_split_copies_part(tmp_path: Path, name: str) -> None:
    made_of, request = COPIES[name]
    plan = tiny.grow(source_of(tmp_path / "a", made_of), tmp_path / "b", **request)
    distances = closest_copies(plan, trained(tmp_path / "b"))
    assert distances and min(distances.values()) > 1e-3, distances
    assert plan_report(plan)["tied_copies"] == []
    assert not any("symmetry of copies" in text for text in plan.warnings)


@pytest.mark.parametrize("name", ["signal", "query", "heads", "ffn", "experts of experts"])
def test_control_even_copies_do_not_and_the_plan_says_so(tmp_path: Path, name: str) -> None:
    made_of, request = COPIES[name]
    source = source_of(tmp_path / "a", made_of)
    plan = tiny.grow(source, tmp_path / "b", symmetry="even", **request)
    distances = closest_copies(plan, trained(tmp_path / "b"))
    assert min(distances.values()) < 1e-5, distances
    if name != "experts of experts":
        assert any("equal for ever" in text for text in plan.warnings)


def test_noise_heads_past_one_to_one_stay_tied_and_the_plan_says_so(tmp_path: Path) -> None:
    plan = tiny.grow(source_of(tmp_path / "a", PAST[0]), tmp_path / "b", **PAST[1])
    assert closest_copies(plan, trained(tmp_path / "b"))["q"] < 1e-5
    report = plan_report(plan)
    assert report["tied_copies"] == ["noise_head"] and report["exactness"] == "exact"
    assert any("symmetry of copies: none" in text for text in plan.warnings)


def test_noise_parts_them_at_its_price(tmp_path: Path) -> None:
    source = source_of(tmp_path / "a", PAST[0])
    plan = tiny.grow(source, tmp_path / "b", symmetry="noise", noise_snr_db=20.0, **PAST[1])
    assert plan.exactness.value == "not-exact" and plan_report(plan)["tied_copies"] == []
    assert any("changes the function" in text for text in plan.warnings)
    old, new = tiny.read_folder(source), tiny.read_folder(tmp_path / "b")
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = next(t for t in plan.tensors if t.output.name == name).dims[0]
    assert rows is not None and rows.perturbed is not None
    units = new[name].reshape(len(rows.source), -1)
    for unit, before in enumerate(old[name].reshape(-1, units.shape[1])):
        copies = units[rows.source == unit]
        if rows.perturbed[rows.source == unit].any():
            assert np.abs(copies.mean(axis=0) - before).max() < 1e-6  # noise that sums to zero
            assert 0.02 < np.abs(copies[0] - before).max() / np.abs(before).max() < 0.5
        else:
            assert (copies == before).all()
    report = verify_checkpoints(source, tmp_path / "b", tokens=64, window=32, generate_tokens=2)
    assert report.max_difference > report.tolerance
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "b") as b:
        assert diff_checkpoints(a, b)["as_grown"]
    assert closest_copies(plan, trained(tmp_path / "b"))["q"] > 1e-3
