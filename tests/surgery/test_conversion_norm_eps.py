"""Qwen3's norms share one epsilon, ours have two: the heads' keeps the value that they had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from converted import allowed, convert, difference, logits, write_source

from growkit.cli.main import main

TARGETS: dict[str, dict[str, Any]] = {
    "gda": {"to": "gda"},
    "diff_v2": {"to": "diff_v2"},
    "shared_diff": {"to": "shared_diff", "rank": 2, "key_rank": 2},
    "wgqa": {"to": "wgqa"},
    "sas": {"to": "sas"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Qwen3 whose epsilon shows."""
    path = write_source(tmp_path_factory.mktemp("sources") / "a", "qwen3")
    config = tiny.read_config(path) | {"rms_norm_eps": 0.05}
    tiny.write_folder(path.with_name("b"), config, tiny.read_folder(path))
    return path.with_name("b"), logits(path.with_name("b"))


@pytest.mark.parametrize("name", TARGETS)
def test_padding_a_converted_model_stays_exact(
    source: tuple[Path, torch.Tensor], tmp_path: Path, name: str
) -> None:
    folder, before = source
    convert(folder, tmp_path / "b", **TARGETS[name])
    assert tiny.read_config(tmp_path / "b")["qk_norm_eps"] == 0.05
    assert difference(before, logits(tmp_path / "b")) <= allowed(before)
    plan = tiny.grow(tmp_path / "b", tmp_path / "c", hidden="41")
    assert plan.exactness.value == "exact"
    grown = tiny.read_config(tmp_path / "c")
    assert grown["qk_norm_eps"] == 0.05
    assert grown["rms_norm_eps"] == pytest.approx(0.05 * 32 / 41)
    assert difference(before, logits(tmp_path / "c")) <= allowed(before)


@pytest.mark.parametrize("eps", [None, 0.05 * 32 / 41], ids=["the class's own", "that of the body"])
def test_another_epsilon_of_the_heads_is_seen(
    source: tuple[Path, torch.Tensor], tmp_path: Path, eps: float | None
) -> None:
    folder, before = source
    convert(folder, tmp_path / "b", "gda")
    tiny.grow(tmp_path / "b", tmp_path / "c", hidden="41")
    config = {k: v for k, v in tiny.read_config(tmp_path / "c").items() if k != "qk_norm_eps"}
    if eps is not None:
        config["qk_norm_eps"] = eps
    tiny.write_folder(tmp_path / "d", config, tiny.read_folder(tmp_path / "c"))
    assert difference(before, logits(tmp_path / "d")) > 10 * allowed(before)


def test_the_fold_wants_one_epsilon(
    source: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Back to Qwen3 as it came; refused once padding has parted the two."""
    folder, before = source
    convert(folder, tmp_path / "b", "gda")
    convert(tmp_path / "b", tmp_path / "folded", "plain")
    config = tiny.read_config(tmp_path / "folded")
    assert (config["model_type"], config["rms_norm_eps"]) == ("qwen3", 0.05)
    assert difference(before, logits(tmp_path / "folded")) <= allowed(before, rounded=True)
    tiny.grow(tmp_path / "b", tmp_path / "c", hidden="41")
    assert main(["export", str(tmp_path / "c"), "--fold", "--out", str(tmp_path / "d")]) == 2
    assert "epsilon of their own" in " ".join(capsys.readouterr().err.split())
    # Silence means the class's 1e-6, not the body's epsilon.
    silent = {k: v for k, v in tiny.read_config(tmp_path / "b").items() if k != "qk_norm_eps"}
    tiny.write_folder(tmp_path / "e", silent, tiny.read_folder(tmp_path / "b"))
    assert main(["export", str(tmp_path / "e"), "--fold", "--out", str(tmp_path / "d")]) == 2
    assert "epsilon of their own (qk_norm_eps = 1e-06)" in capsys.readouterr().err
