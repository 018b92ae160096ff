"""Every attention variant grows by every operator that its algebra allows, and by no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from shrink import shrink
from variant_checkpoints import VARIANTS, write_variant

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError
from growkit.families import FAMILIES
from growkit.families.base import Dim, consumes, produces
from growkit.families.unit_layout import Sizes, Units, plain, split_parts
from growkit.record.inspect import inspect_checkpoint
from growkit.surgery.plan import build_plan
from growkit.surgery.request import GrowthRequest
from growkit.verification import VerificationReport, verify_checkpoints

ORDINARY = [{"query_heads": "x2"}, {"query_heads": "x3", "new_heads": "zero"}]
WITH_KEYS = [
    *ORDINARY,
    {"heads": "x2"},
    {"kv_heads": "x2"},
    {"query_heads": "x2", "kv_heads": "x2"},
]
PAIRS = [{"uniform_heads": "x2"}, {"kv_heads": "x2"}, {"signal_heads": "x2"}]
# Head operators of each variant.
HEADS: dict[str, list[dict[str, Any]]] = {
    "gqa": WITH_KEYS,
    "diff_v1": [*PAIRS, {"noise_heads": "x2"}],
    "diff_v1-plain": PAIRS,
    "diff_v2": [*PAIRS, {"uniform_heads": "x2", "signal_heads": "x3"}],
    "gda_gated": [
        {"signal_heads": "x2"},
        {"signal_heads": "+2", "new_heads": "zero"},
        {"noise_heads": "x4"},
        {"uniform_heads": "x2"},
        {"kv_heads": "x2"},
    ],
    "shared_diff": WITH_KEYS,
    "shared_diff-q": WITH_KEYS,
    "wgqa": ORDINARY,
    "wgqa-column": ORDINARY,
    "wgqa-row": [*ORDINARY, {"query_heads": "x2", "hidden": "x2"}],
    "sas": [],
}
BODY = [
    {"layers": "+1", "ffn": "x1.5", "hidden": "x2"},
    {"hidden": "x2", "tied": True},
    {"hidden": "41"},
]
CASES = [(name, request) for name in VARIANTS for request in [*BODY, *HEADS[name]]]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in request.items())}" for name, request in CASES]


def verified(a: Path, b: Path) -> VerificationReport:
    return verify_checkpoints(a, b, tokens=48, window=24, generate_tokens=3)


@pytest.mark.parametrize(("name", "request_"), CASES, ids=IDS)
def test_growth_keeps_the_function(tmp_path: Path, name: str, request_: dict[str, Any]) -> None:
    request_ = dict(request_)
    tied = request_.pop("tied", False)
    source = write_variant(tmp_path / "a", name, tie_word_embeddings=tied)
    plan = tiny.grow(source, tmp_path / "b", **request_)
    report = verified(source, tmp_path / "b")
    assert report.passed and report.max_difference < 1e-4, report.cause
    assert plan.exactness.value in ("exact", "bit-exact")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert "AutoModelForCausalLM" in config["auto_map"]
    assert (tmp_path / "b" / f"modeling_{config['model_type']}.py").is_file()


def written_as(name: str, tmp_path: Path, **request_: Any) -> dict[str, Any]:
    source = write_variant(tmp_path / "a", name)
    tiny.grow(source, tmp_path / "b", **request_)
    config: dict[str, Any] = json.loads((tmp_path / "b" / "config.json").read_text())
    return config


def test_signal_growth_of_diff_v2_is_written_as_token_gated_gda(tmp_path: Path) -> None:
    config = written_as("diff_v2", tmp_path, signal_heads="x2")
    assert (config["attention"], config["num_attention_heads"]) == ("gda_gated", 12)
    assert config["num_noise_heads"] == 4


def test_signal_growth_of_diff_v1_is_written_as_gda(tmp_path: Path) -> None:
    config = written_as("diff_v1-plain", tmp_path, signal_heads="x2")
    assert (config["model_type"], config["noise_keys"]) == ("gda", "own")
    assert config["sub_layer_norm"] is False


@pytest.mark.parametrize(
    ("name", "request_", "words"),
    [
        ("wgqa", {"kv_heads": "x2"}, ["--kv-heads cannot grow a wgqa", "sums over the heads"]),
        ("wgqa", {"heads": "x2"}, ["--heads cannot grow a wgqa", "--query-heads"]),
        ("sas", {"query_heads": "x2"}, ["--query-heads cannot grow a sas", "every trained head"]),
        ("sas", {"heads": "x2"}, ["--heads cannot grow a sas", "--layers, --ffn, --hidden"]),
        ("sas", {"kv_heads": "x2"}, ["--kv-heads cannot grow a sas"]),
        ("diff_v2", {"noise_heads": "x2"}, ["one noise head", "8 noise heads are more than 4"]),
        ("gda_gated", {"noise_heads": "x8"}, ["16 noise heads are more than 8 signal heads"]),
        ("gqa", {"signal_heads": "x2"}, ["no signal heads", "--query-heads"]),
    ],
)
def test_what_is_not_exact_is_refused_by_name(
    tmp_path: Path, name: str, request_: dict[str, str], words: list[str]
) -> None:
    source = write_variant(tmp_path / "a", name)
    with open_checkpoint(source) as checkpoint, pytest.raises(UsageError) as refusal:
        build_plan(checkpoint, GrowthRequest(**request_).operators())
    for word in words:
        assert word in f"{refusal.value.cause} {refusal.value.remedy}"


@pytest.mark.parametrize("name", VARIANTS)
def test_inspect_says_what_can_grow(tmp_path: Path, name: str) -> None:
    with open_checkpoint(write_variant(tmp_path / "a", name)) as checkpoint:
        report = inspect_checkpoint(checkpoint)
    assert report["family"] == VARIANTS[name]["attention"]
    asked = {f"--{key.replace('_', '-')}" for request in HEADS[name] for key in request}
    grown = {option for option in report["can_grow"] if option.endswith("heads")}
    assert asked - {"--new-heads", "--hidden"} <= grown
    assert {"--layers", "--ffn", "--hidden"} <= set(report["can_grow"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["BF16", "F32"])
@pytest.mark.parametrize("name", [name for name in VARIANTS if HEADS[name]])
def test_grow_then_shrink_gives_back_the_bytes(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    source = write_variant(tmp_path / "a", name, dtype)
    plan = tiny.grow(source, tmp_path / "b", ffn="+9", hidden="x2", layers="+2", **HEADS[name][0])
    back, old = shrink(plan, tiny.read_folder(tmp_path / "b")), tiny.read_folder(source)
    assert back.keys() == old.keys()
    for tensor in old:
        assert tiny.same_bits(back[tensor], old[tensor]), tensor


# -- negative controls: a table that is wrong in one place ----------------------------------------


def rows_in_another_order(sizes: Sizes) -> Units:
    """The copies behind all heads instead of beside theirs, once there are copies."""
    units, count = plain("signal_head")(sizes), sizes["signal_head"]
    order = np.arange(count).reshape(-1, 2).T.reshape(-1) if count > 8 else np.arange(count)
    return replace(units, index=order)


BROKEN: dict[str, tuple[str, str, dict[str, Any], str, Dim]] = {
    "lambda_proj that stays behind": (
        *("gda_gated", "gda_gated", {"signal_heads": "x2"}, "lambda_proj"),
        produces(rows_in_another_order),
    ),
    "weights of the merge copied, not shared": (
        *("wgqa", "wgqa", {"query_heads": "x2"}, "w_v_scalar"),
        produces(plain("query_head")),
    ),
    "updates with all first maps in front": (
        *("shared_diff", "shared_diff-q", {"query_heads": "x2"}, "q_up"),
        produces(split_parts("query_head", 2, lambda sizes: sizes["head_dim"])),
    ),
    "updates that read hidden channels unshared": (
        *("shared_diff", "shared_diff-q", {"hidden": "x2"}, "q_down"),
        produces(plain("hidden")),
    ),
    "row weights that share hidden channels": (
        *("wgqa", "wgqa-row", {"hidden": "x2"}, "w_v_row"),
        consumes(plain("hidden")),
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_table_that_is_wrong_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    family, name, request_, role, dim = BROKEN[what]
    table = FAMILIES[family]
    tensor = table.tensor(role)
    assert tensor is not None
    last = 1 if "hidden" in what else 0
    dims = tuple(dim if i == last else old for i, old in enumerate(tensor.dims))
    tensors = tuple(replace(t, dims=dims) if t is tensor else t for t in table.tensors)
    source = write_variant(tmp_path / "a", name)
    monkeypatch.setitem(FAMILIES, family, replace(table, tensors=tensors))
    tiny.grow(source, tmp_path / "b", **request_)
    assert not verified(source, tmp_path / "b").passed
