"""Experts in ``growkit diff``, in plans and in inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
from expert_checkpoints import LAYOUTS, changed, source_folder

from growkit.checkpoint import open_checkpoint
from growkit.cli.main import main
from growkit.diff.folders import diff_checkpoints


def diff(a: Path, b: Path) -> dict[str, Any]:
    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        return diff_checkpoints(first, second)


def texts(report: dict[str, Any], ending: str) -> list[str]:
    return [g["text"] for g in report["groups"] if g["tensor"].endswith(ending)]


def test_upcycling_is_explained(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "a", "llama")
    tiny.grow(source, tmp_path / "b", experts="4")
    report = diff(source, tmp_path / "b")
    assert report["as_grown"]
    assert texts(report, "gate.weight") == ["new, without a source"]
    assert texts(report, "experts.{expert}.w1.weight") == [
        "expert 0: unchanged",
        "experts 1-3 (copies of 0): unchanged",
    ]


def test_copies_of_experts_are_explained(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        source = source_folder(tmp_path / layout, "mixtral", layout)
        tiny.grow(source, tmp_path / f"{layout}-b", experts="x2")
        report = diff(source, tmp_path / f"{layout}-b")
        assert report["as_grown"]
        router = "rows 0-3 unchanged, 4-7 copies"
        share = "2 copies of an expert carry 2 times their part of the weight"
        assert texts(report, ".gate.weight") == [router]
        if layout == "fused":
            assert texts(report, "experts.gate_up_proj") == [router.replace("rows", "experts")]
            assert texts(report, "experts.down_proj") == [f"experts 0-3 old, 4-7 copies; {share}"]
        else:
            (old, copies) = texts(report, "experts.{expert}.w2.weight")
            assert (old, copies) == (
                f"experts 0-3: {share}",
                f"experts 4-7 (copies of 0-3): {share}",
            )


@pytest.mark.parametrize(
    ("layout", "name", "index"),
    [
        ("separate", "model.layers.1.block_sparse_moe.experts.6.w3.weight", (3, 3)),
        ("separate", "model.layers.1.block_sparse_moe.experts.6.w2.weight", (3, 3)),
        ("fused", "model.layers.1.mlp.experts.gate_up_proj", (7, 5, 5)),
        ("fused", "model.layers.1.mlp.experts.down_proj", (7, 5, 5)),
        ("fused", "model.layers.2.mlp.experts.down_proj", (7, 5, 5)),  # zero, of a new layer
    ],
)
def test_one_changed_entry_is_found(
    tmp_path: Path, layout: str, name: str, index: tuple[int, ...]
) -> None:
    source = source_folder(tmp_path / "a", "mixtral", layout)
    tiny.grow(source, tmp_path / "b", experts="x2", layers="+1", ffn="x2", hidden="x2")
    assert diff(source, tmp_path / "b")["as_grown"]

    def flip(tensors: tiny.Tensors) -> None:
        tensors[name].view(np.uint32)[index] ^= 1 << 20

    report = diff(source, changed(tmp_path / "b", flip))
    assert report["as_grown"] is False
    assert sum(group["differing"] for group in report["groups"]) == 1


def test_folders_with_experts_without_a_plan(tmp_path: Path) -> None:
    a, b = (source_folder(tmp_path / n, "qwen3_moe") for n in "ab")
    assert diff(a, b)["identical"]
    report = diff(a, b)
    assert texts(report, "experts.{expert}.up_proj.weight") == ["experts 0-3: unchanged"]


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = source_folder(tmp_path / "a", "qwen3")
    flags = ["--experts", "8", "--experts-per-token", "3", "--ffn", "x1.5", "--layers", "+1"]
    recipe = tmp_path / "recipe.yaml"
    assert main(["plan", str(source), *flags, "--save-recipe", str(recipe)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "plan: qwen3 -> qwen3_moe" in shown and "active parameters" in shown
    assert "FFN -> 8 experts, 3 per token; new router; exact" in shown
    assert main(["plan", str(source), "--recipe", str(recipe), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    plan = report.get("plan", report)
    assert plan["axes"]["expert"] == {"label": "experts", "before": 1, "after": 8}
    assert plan["axes"]["active_expert"]["after"] == 3
    assert plan["axes"]["ffn"]["label"] == "expert width (moe_intermediate_size)"
    assert plan["after"]["active_parameters"] < plan["after"]["parameters"]
    out = str(tmp_path / "b")
    assert main(["grow", str(source), "--out", out, "--recipe", str(recipe), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["inspect", out, "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert inspected["axes"]["expert"]["size"] == 8 and "--experts" in inspected["can_grow"]
    assert main(["plan", str(source), "--experts-per-token", "3"]) == 2
    assert main(["inspect", str(source), "--json"]) == 0
    assert "--experts" in capsys.readouterr().out
