"""Experts that have a part of the FFN each, a shared expert, and dense classes whose matrices are
stored as one: through transformers on the written files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from expert_checkpoints import changed, verified
from family_checkpoints import family_config, write_checkpoint
from transformers import AutoModelForCausalLM

from growkit.checkpoint import open_checkpoint
from growkit.optimizer_state.rules import state_rules
from growkit.record.manifest import read_manifest
from growkit.surgery.plan import build_plan
from growkit.surgery.request import GrowthRequest

SIZES = {"num_hidden_layers": 2, "intermediate_size": 48}
TOGETHER = {"hidden": "x2", "heads": "x2", "layers": "+1"}
WHOLE_HEADS = {"partial_rotary_factor": 1.0}
# (family, changes of its config, request) -> exactness
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "halves": ("llama", {}, {"experts": "8", "expert_width": 24}, "exact"),
    "thirds": ("mistral", {}, {"experts": "6", "expert_width": 16, **TOGETHER}, "rounded"),
    "one group": ("qwen3", {}, {"experts": "2", "expert_width": 24, "symmetry": "noise"}, "exact"),
    "chosen": ("qwen3", {}, {"experts": "4", "expert_width": 24, "expert_layers": "1"}, "exact"),
    "shared": ("qwen2", {}, {"experts": "4"}, "exact"),
    "shared and halves": ("qwen2", {}, {"experts": "4", "expert_width": 24, **TOGETHER}, "exact"),
    "shared, a part": (
        *("qwen2", {}),
        *({"experts": "4", "expert_width": 16, "shared_expert_width": 16}, "exact"),
    ),
    "shared, chosen": ("qwen2", {}, {"experts": "4", "expert_layers": "1"}, "exact"),
    "fused": ("phi3", WHOLE_HEADS, {"experts": "4", **TOGETHER}, "exact"),
    "fused, windows": ("phi3", WHOLE_HEADS | {"sliding_window": 16}, {"experts": "2"}, "exact"),
}


def source(path: Path, case: str, dtype: torch.dtype = torch.float32) -> Path:
    family, changes, *_ = CASES[case]
    return write_checkpoint(path, family_config(family, **SIZES | changes), dtype)


RUNS = [(case, torch.float32) for case in CASES]
RUNS += [(case, torch.bfloat16) for case in ("thirds", "shared, a part", "fused")]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=lambda v: str(v).removeprefix("torch."))
def test_the_function_is_kept_and_a_change_of_experts_is_seen(
    tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    request, exactness = CASES[case][2:]
    folder = source(tmp_path / "a", case, dtype)
    plan = tiny.grow(folder, tmp_path / "b", **request)
    assert plan.exactness.value == exactness
    _, said = AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(said.values()), said
    report = verified(folder, tmp_path / "b")
    assert report.passed, report.cause
    if dtype is torch.float32 or exactness == "exact":
        assert report.max_difference < 2e-5

    def alter(tensors: tiny.Tensors) -> None:
        for name, array in tensors.items():
            if "layers.1" in name and DOWN.search(name):
                array[:] *= array.dtype.type(1.5)

    assert not verified(folder, changed(tmp_path / "b", alter)).passed


DOWN = re.compile(r"experts\.[13579]\.(w2|down_proj)\.weight")  # every second expert's output


def test_what_the_shared_expert_and_the_routed_ones_hold(tmp_path: Path) -> None:
    folder = source(tmp_path / "a", "shared, a part")
    tiny.grow(folder, tmp_path / "b", **CASES["shared, a part"][2])
    old, new = tiny.read_folder(folder), tiny.read_folder(tmp_path / "b")
    at = "model.layers.1.mlp."
    up, down = (old[f"{at}{name}_proj.weight"] for name in ("up", "down"))
    assert tiny.same_bits(new[at + "shared_expert.up_proj.weight"], up[:16])
    assert tiny.same_bits(new[at + "shared_expert.down_proj.weight"], 2 * down[:, :16])
    assert not new[at + "shared_expert_gate.weight"].any()
    for expert in range(4):
        units = slice(16 + expert % 2 * 16, 32 + expert % 2 * 16)
        mine = f"{at}experts.{expert}."
        assert tiny.same_bits(new[mine + "up_proj.weight"], up[units])
        assert tiny.same_bits(new[mine + "down_proj.weight"], 2 * down[:, units])
    router = new[at + "gate.weight"]
    assert (router[0] == router[1]).all() and (router[2] == router[3]).all()
    assert not np.allclose(router[0], router[2])
    recorded = (read_manifest(tmp_path / "b") or {})["new_parameters"]
    assert [f"{at}experts.{e}.up_proj.weight" in recorded for e in range(4)] == [
        *(False, False, True, True)
    ]


@pytest.mark.parametrize("case", ["halves", "shared", "shared and halves", "shared, a part"])
def test_moments_follow_the_parts(tmp_path: Path, case: str) -> None:
    """By the rules, the old gradient is shared out to experts: their sum is what backward gives."""
    request = {k: v for k, v in CASES[case][2].items() if k not in TOGETHER}
    folder = source(tmp_path / "a", case)
    tiny.grow(folder, tmp_path / "b", **request)
    asked = GrowthRequest(**request)
    with open_checkpoint(folder) as checkpoint:
        rules = state_rules(build_plan(checkpoint, asked.operators()))
    old, new = (_gradients(tmp_path / name) for name in "ab")
    at = "model.layers.0.mlp."
    moe = at if case != "halves" else "model.layers.0.block_sparse_moe."
    experts, stacks = f"{moe}experts.", ("gate_up_proj", "down_proj")
    gate_up, down = (new[f"{at}experts.{name}"] for name in stacks)
    width = down.shape[2]
    found = {"up": gate_up[:, width:], "down": down}
    for rule in rules:
        name, source_name = rule.tensor.output.name, rule.source
        if "shared_expert." in name and at in name:
            assert source_name is not None and rule.exact
            expected = _mapped(rule, old[source_name])
            assert torch.allclose(new[name], expected, rtol=1e-3, atol=1e-6)
    names = {"up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
    for matrix, spellings in names.items():
        # of each part of the units the copies together
        of = [r for r in rules if r.tensor.output.name.startswith(experts)]
        of = [r for r in of if r.tensor.output.name.split(".")[-2] in spellings]
        parts = len({r.tensor.dims for r in of})
        for part in range(parts):
            mine = [r for r in of if (r.tensor.expert or 0) % parts == part]
            expected = sum(_mapped(r, old[str(r.source)]) for r in mine)
            total = sum(found[matrix][r.tensor.expert] for r in mine)
            assert torch.allclose(total, expected, rtol=1e-3, atol=1e-6), (matrix, part)


def _mapped(rule: Any, gradient: torch.Tensor) -> torch.Tensor:
    grown = gradient * rule.mean
    for axis, dim in enumerate(rule.dims):
        if dim is not None:
            grown = grown.index_select(axis, torch.from_numpy(dim.map.source))
    return grown


def _gradients(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(1, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", ["shared, a part", "halves"])
def test_what_was_made_grows_again(tmp_path: Path, case: str) -> None:
    folder = source(tmp_path / "a", case)
    tiny.grow(folder, tmp_path / "b", **CASES[case][2])
    plan = tiny.grow(tmp_path / "b", tmp_path / "c", experts="x2", ffn="x2", **TOGETHER)
    assert plan.exactness.value == "exact"
    report = verified(folder, tmp_path / "c")
    assert report.passed and report.max_difference < 2e-5, report.cause
