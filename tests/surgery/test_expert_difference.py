# SPDX-License-Identifier: Apache-2.0
"""Experts that differ from the start: noise and units drawn anew, against plain NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
from expert_checkpoints import LAYOUTS, changed, source_folder, unstacked, verified

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError
from growkit.diff.folders import diff_checkpoints
from growkit.record.manifest import read_manifest
from growkit.surgery.plan import build_plan
from growkit.surgery.request import GrowthRequest

AT = "model.layers.1."
DENSE = AT + "mlp.{}_proj.weight"
EXPERT = AT + "block_sparse_moe.experts.{}.{}.weight"
NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def experts_of(tensors: tiny.Tensors, part: str, count: int) -> tiny.Array:
    return np.stack([tensors[EXPERT.format(e, NAMES[part])] for e in range(count)])


def as_grown(a: Path, b: Path) -> bool:
    with open_checkpoint(a) as old, open_checkpoint(b) as new:
        return bool(diff_checkpoints(old, new)["as_grown"])


# -- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decibels", [10.0, 40.0])
def test_noise_of_upcycled_experts_sums_to_zero_over_all(tmp_path: Path, decibels: float) -> None:
    source = source_folder(tmp_path / "a", "llama")
    request = {"experts": "4", "symmetry": "noise", "noise_snr_db": decibels}
    plan = tiny.grow(source, tmp_path / "b", **request)
    assert plan.exactness.value == "not-exact"
    assert sum("not exact: noise" in warning for warning in plan.warnings) == 1
    old, new = tiny.read_folder(source), tiny.read_folder(tmp_path / "b")
    for part in ("gate", "up"):
        assert all((e == old[DENSE.format(part)]).all() for e in experts_of(new, part, 4))
    down = old[DENSE.format("down")].astype(np.float64)
    noise = experts_of(new, "down", 4) - down
    assert np.abs(noise.mean(axis=0)).max() < 1e-6
    assert all(np.abs(n).max() > 0 for n in noise)
    ratio = np.sqrt((noise**2).mean() / (down**2).mean())
    assert ratio == pytest.approx(10 ** (-decibels / 20), rel=0.15)
    assert as_grown(source, tmp_path / "b")


def test_what_of_the_noise_is_exact(tmp_path: Path) -> None:
    """All experts at equal weights: it cancels. Two of four: it does not."""
    source = source_folder(tmp_path / "a", "llama")
    tiny.grow(source, tmp_path / "b", experts="4", symmetry="noise", experts_per_token=4)

    def no_preference(tensors: tiny.Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith("gate.weight") and "block_sparse_moe" in name:
                tensor[:] = 0

    everything = changed(tmp_path / "b", no_preference)
    assert verified(source, everything).max_difference < 1e-5
    differences = []
    for decibels in (60.0, 10.0):
        out = tmp_path / f"c{decibels}"
        tiny.grow(source, out, experts="4", symmetry="noise", noise_snr_db=decibels)
        differences.append(verified(source, out).max_difference)
    assert 1e-5 < differences[0] < differences[1] / 50


def test_noise_where_top_k_does_not_grow(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "a", "mixtral")
    request = {"experts": "x2", "experts_per_token": 2}
    tiny.grow(source, tmp_path / "even", **request)
    plan = tiny.grow(source, tmp_path / "b", symmetry="noise", **request)
    assert plan.exactness.value == "not-exact"
    plain = experts_of(tiny.read_folder(tmp_path / "even"), "down", 8)
    noisy = experts_of(tiny.read_folder(tmp_path / "b"), "down", 8)
    assert (noisy != plain).any(axis=(1, 2)).all()
    assert noisy[:4] + noisy[4:] == pytest.approx(2 * plain[:4], abs=1e-6)


# -- units drawn anew -----------------------------------------------------------------------------


def test_half_of_the_units_of_every_expert_are_drawn_anew(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "a", "llama")
    plan = tiny.grow(source, tmp_path / "b", experts="4", expert_reinit=0.5)
    assert plan.exactness.value == "not-exact"
    old, new = tiny.read_folder(source), tiny.read_folder(tmp_path / "b")
    width = old[DENSE.format("gate")].shape[0]
    units = {
        part: (experts_of(new, part, 4) != old[DENSE.format(part)]).any(axis=1 + (part != "down"))
        for part in NAMES
    }
    assert (units["gate"].sum(axis=1) == width // 2).all()
    assert (units["gate"] == units["up"]).all() and (units["gate"] == units["down"]).all()
    assert len({tuple(expert) for expert in units["gate"]}) == 4
    for part in NAMES:
        before, drawn = old[DENSE.format(part)], experts_of(new, part, 4)
        drawn = drawn if part != "down" else drawn.transpose(0, 2, 1)
        values = drawn[units[part]]
        assert values.std() == pytest.approx(before.std(), rel=0.1)
        assert values.mean() == pytest.approx(before.mean(), abs=float(0.1 * before.std()))
    assert as_grown(source, tmp_path / "b")
    listed = (read_manifest(tmp_path / "b") or {})["new_parameters"]
    assert all(listed[EXPERT.format(0, name)] == "all" for name in NAMES.values())
    for seed, same in ((0, True), (1, False)):
        tiny.grow(source, tmp_path / f"again{seed}", experts="4", expert_reinit=0.5, seed=seed)
        again = experts_of(tiny.read_folder(tmp_path / f"again{seed}"), "up", 4)
        assert (again == experts_of(new, "up", 4)).all() == same


def test_a_unit_kept_by_accident_is_seen(tmp_path: Path) -> None:
    """Negative control of the comparison: an old entry that changed is a difference."""
    source = source_folder(tmp_path / "a", "llama")
    tiny.grow(source, tmp_path / "b", experts="2", expert_reinit=0.5)
    old = tiny.read_folder(source)[DENSE.format("gate")]

    def touch(tensors: tiny.Tensors) -> None:
        gate = tensors[EXPERT.format(1, "w1")]
        kept = np.flatnonzero((gate == old).all(axis=1))
        gate[kept[0], 0] += 1

    assert not as_grown(source, changed(tmp_path / "b", touch))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_further_copies_are_drawn_anew(tmp_path: Path, layout: str) -> None:
    source = source_folder(tmp_path / "a", "qwen3_moe", layout)
    tiny.grow(source, tmp_path / "b", experts="x2", expert_reinit=0.25, layers="+1")
    assert as_grown(source, tmp_path / "b")
    config = tiny.read_config(source)
    old, new = (unstacked(tiny.read_folder(f), config) for f in (source, tmp_path / "b"))
    name = AT + "mlp.experts.{}.{}_proj.weight"
    for part, axis in (("gate", 1), ("up", 1), ("down", 0)):
        for expert in range(4):
            before = old[name.format(expert, part)]
            assert (new[name.format(expert, part)] == before).all()
            units = (new[name.format(expert + 4, part)] != before).any(axis=axis)
            assert units.sum() == round(0.25 * len(units))


@pytest.mark.parametrize(
    ("family", "request_", "cause"),
    [
        ("llama", {"experts": "4", "expert_reinit": 0.5, "ffn": "x2"}, "change in the same plan"),
        ("llama", {"experts": "4", "expert_reinit": 1.5}, "1.5 is no part"),
        ("llama", {"layers": "+1", "expert_reinit": 0.5}, "no effect without --experts"),
        ("llama", {"layers": "+1", "experts_per_token": 1}, "no effect without --experts"),
        ("mixtral", {"experts": "+2", "symmetry": "noise"}, "no whole multiple of 4"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, family: str, request_: dict[str, Any], cause: str
) -> None:
    source = source_folder(tmp_path / "a", family)
    with pytest.raises(UsageError, match=cause) as refusal, open_checkpoint(source) as checkpoint:
        build_plan(checkpoint, GrowthRequest(**request_).operators())
    assert refusal.value.remedy


def test_a_switched_off_auxiliary_loss_is_said_once(tmp_path: Path) -> None:
    for family, request in (("llama", "4"), ("mixtral", "x2")):
        source = source_folder(tmp_path / family, family)
        plan = tiny.grow(source, tmp_path / f"{family}-b", experts=request)
        said = [w for w in plan.warnings if "training.router_aux_loss" in w]
        assert len(said) == 1
        config = tiny.read_config(tmp_path / f"{family}-b") | {"output_router_logits": True}
        tensors = tiny.read_folder(tmp_path / f"{family}-b")
        switched = tiny.write_folder(tmp_path / f"{family}-c", config, tensors)
        plan = tiny.grow(switched, tmp_path / f"{family}-d", experts="x2")
        assert not any("training.router_aux_loss" in w for w in plan.warnings)


def test_a_recipe_key_without_a_value_is_as_if_absent() -> None:
    keys = ("expert_reinit", "noise_snr_db", "seed", "symmetry", "untie_embeddings", "format")
    request = GrowthRequest.from_mapping({"experts": 4, **dict.fromkeys(keys)})
    assert request == GrowthRequest(experts="4")
