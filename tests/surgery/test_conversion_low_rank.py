"""DIFF V1 -> Shared DIFF: the truncated decomposition is the best one, and its error is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
from converted import LAYERS, allowed, convert, difference, logits
from variant_checkpoints import write_variant

from growkit.cli.main import main

DIM = 8
NAME = "model.layers.1.self_attn."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    extras = dict.fromkeys(("attention_bias", "attention_output_bias"), False)
    path = tmp_path_factory.mktemp("v1") / "a"
    return write_variant(path, "diff_v1", num_hidden_layers=LAYERS, **extras)


def rebuilt(folder: Path, kind: str) -> tiny.Array:
    """base + update of every map: [heads, map, d, hidden]."""
    tensors = tiny.read_folder(folder)
    base = tensors[f"{NAME}{kind}_proj.weight"].astype(np.float64).reshape(-1, 1, DIM, 32)
    up = tensors[f"{NAME}{kind}_up.weight"].astype(np.float64)
    rank = up.shape[1]
    down = tensors[f"{NAME}{kind}_down.weight"].astype(np.float64).reshape(-1, 2, rank, 32)
    return base + up.reshape(-1, 2, DIM, rank) @ down


def original(folder: Path, kind: str) -> tiny.Array:
    weight = tiny.read_folder(folder)[f"{NAME}{kind}_proj.weight"]
    return weight.astype(np.float64).reshape(-1, 2, DIM, 32)


def test_half_the_channels_lose_nothing(source: Path, tmp_path: Path) -> None:
    plan = convert(source, tmp_path / "b", "shared_diff", rank=DIM // 2)
    assert plan.exactness.value == "rounded"
    before = logits(source)
    assert difference(before, logits(tmp_path / "b")) <= allowed(before, rounded=True)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_error_is_the_tail_of_the_singular_values(
    source: Path, tmp_path: Path, rank: int
) -> None:
    plan = convert(source, tmp_path / "b", "shared_diff", rank=rank)
    assert plan.exactness.value == "not-exact"
    for kind in ("q", "k"):
        pairs = original(source, kind)
        values = np.linalg.svd(pairs[:, 0] - pairs[:, 1], compute_uv=False)
        lost = ((rebuilt(tmp_path / "b", kind) - pairs) ** 2).sum()
        assert lost == pytest.approx((values[:, 2 * rank :] ** 2).sum() / 2, rel=1e-4)
    assert difference(before := logits(source), logits(tmp_path / "b")) > 10 * allowed(before)


def test_one_base_in_the_middle_is_worse(source: Path, tmp_path: Path) -> None:
    """The control: the mean as base and the same r directions for both maps lose more."""
    convert(source, tmp_path / "b", "shared_diff", rank=2)
    pairs = original(source, "q")
    u, s, v = np.linalg.svd((pairs[:, 0] - pairs[:, 1]) / 2, full_matrices=False)
    half = (u[:, :, :2] * s[:, None, :2]) @ v[:, :2]
    mean = pairs.mean(axis=1)
    naive = np.stack([mean + half, mean - half], axis=1)
    ours = ((rebuilt(tmp_path / "b", "q") - pairs) ** 2).sum()
    assert ours < 0.9 * ((naive - pairs) ** 2).sum()


def test_error_by_rank_stands_in_the_manifest(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--to", "shared_diff", "--rank", "2", "--key-rank", "4"]
    assert main(["convert", str(source), *arguments, "--out", str(tmp_path / "b")]) == 0
    manifest = json.loads((tmp_path / "b/growkit.json").read_text())
    (text,) = (w for w in manifest["plan"]["warnings"] if "by rank" in w)
    assert text.startswith("relative error of the projections by rank: queries 1: 0.")
    assert text.endswith(", 4: 0")
    assert "by rank" in capsys.readouterr().err
    assert main(["diff", str(source), str(tmp_path / "b")]) == 0
    assert "every part is what its plan says" in capsys.readouterr().out


def test_what_does_not_fit_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "head_dim": DIM}
    halves = tiny.make_folder(tmp_path / "d", tiny.diffllama_config(8, 4, **sizes))
    biased = write_variant(tmp_path / "v", "diff_v1", num_hidden_layers=LAYERS)
    for folder, ranks, words in (
        (source, ["9"], "from 1 to 8"),
        (source, ["2", "--key-rank", "0"], "keys of their own"),
        (halves, ["2"], "--to diff_v1"),
        (biased, ["2"], "biases"),
    ):
        arguments = ["--to", "shared_diff", "--rank", *ranks, "--out", str(tmp_path / "b")]
        assert main(["convert", str(folder), *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
