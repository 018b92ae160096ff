"""Negative controls: each breaks one promise of one conversion, and it shows in the logits.

What a test of exactness cannot see is worth nothing: every control is measured with the same
yardstick that the exact conversions are held to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from converted import LAYERS, allowed, convert, difference, logits, write_source

from growkit.cli.main import main
from growkit.variants.gqa import convert as kv_heads
from growkit.variants.plain import convert as fold
from growkit.variants.sas import convert as sas

DIM = 8
Break = Callable[[tiny.Tensors], None]


def attention(tensors: tiny.Tensors, name: str) -> list[tiny.Array]:
    """One tensor of every layer, to change in place."""
    return [tensors[f"model.layers.{i}.self_attn.{name}"] for i in range(LAYERS)]


def times_o(factor: float) -> Break:
    def change(tensors: tiny.Tensors) -> None:
        for o in attention(tensors, "o_proj.weight"):
            o *= factor

    return change


def pairs_by_halves(tensors: tiny.Tensors) -> None:
    """DIFF V2 pairs stand beside each other; halves would subtract another head's map."""
    for q in attention(tensors, "q_proj.weight"):
        heads = q.reshape(-1, 2, DIM, q.shape[-1]).copy()
        q[:] = np.concatenate([heads[:, 0], heads[:, 1]]).reshape(q.shape)


def noise_of_another_head(tensors: tiny.Tensors) -> None:
    for q in attention(tensors, "q_proj.weight"):
        heads = q.reshape(-1, 2, DIM, q.shape[-1])
        heads[:, 1] = np.roll(heads[:, 1], 1, axis=0)


def lambda_moved(tensors: tiny.Tensors) -> None:
    for k1, q1 in zip(*(attention(tensors, f"lambda_{v}1") for v in "kq"), strict=True):
        q1[:] = 0.1 * k1 / (k1 @ k1)


def copies_tiled(name: str) -> Break:
    """Copies of key/value heads behind all of them instead of beside their own."""

    def change(tensors: tiny.Tensors) -> None:
        for matrix in attention(tensors, name):
            heads = matrix.reshape(2, 2, DIM, -1)
            matrix[:] = heads.swapaxes(0, 1).reshape(matrix.shape).copy()

    return change


def updates_not_zero(tensors: tiny.Tensors) -> None:
    for up in attention(tensors, "q_up.weight"):
        up += 0.05


def merge_weights_of_the_mean(tensors: tiny.Tensors) -> None:
    for w in attention(tensors, "w_k"):
        w *= 0.5


def value_noise_not_opposite(tensors: tiny.Tensors) -> None:
    for taps in attention(tensors, "simulate_v.heads.weight"):
        taps[0, 0] += 0.1


def residual_speaks(tensors: tiny.Tensors) -> None:
    for residual in attention(tensors, "simulate_q.heads_residual.weight"):
        residual += 0.05


CONTROLS: dict[str, tuple[str, dict[str, Any], Break]] = {
    "diff_v2: output not doubled": ("gqa", {"to": "diff_v2"}, times_o(0.5)),
    "diff_v2: pairs by halves": ("gqa", {"to": "diff_v2"}, pairs_by_halves),
    "diff_v2: noise of another head": ("qwen3", {"to": "diff_v2"}, noise_of_another_head),
    "gda: lambda not zero": ("gqa", {"to": "gda"}, lambda_moved),
    "gda mirror: factor missing": ("mha", {"to": "gda", "mirror": 0.5}, times_o(0.5)),
    "gda mirror: not a mirror": ("mha", {"to": "gda", "mirror": 0.5}, noise_of_another_head),
    "gda_gated: output not doubled": ("gqa", {"to": "gda_gated"}, times_o(0.5)),
    "shared_diff: updates speak": ("gqa", {"to": "shared_diff", "rank": 2}, updates_not_zero),
    "shared_diff: factor missing": ("gqa", {"to": "shared_diff", "rank": 2}, times_o(0.5)),
    "mha: keys tiled": ("gqa", {"to": "mha"}, copies_tiled("k_proj.weight")),
    "mha: values tiled": ("gqa", {"to": "mha"}, copies_tiled("v_proj.weight")),
    "wgqa: shares tiled": ("gqa", {"to": "wgqa"}, copies_tiled("v_proj.weight")),
    "wgqa: mean of shares": ("gqa", {"to": "wgqa"}, merge_weights_of_the_mean),
    "sas: noise not opposite": ("gqa", {"to": "sas"}, value_noise_not_opposite),
    "sas: residual speaks": ("gqa", {"to": "sas"}, residual_speaks),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name -> (folder, logits), each made once."""
    folder = tmp_path_factory.mktemp("sources")

    @cache
    def source(name: str) -> tuple[Path, torch.Tensor]:
        path = write_source(folder / name, name)
        return path, logits(path)

    return source


@pytest.mark.parametrize("name", CONTROLS)
def test_a_broken_conversion_is_seen(sources: Any, tmp_path: Path, name: str) -> None:
    source, request, change = CONTROLS[name]
    folder, before = sources(source)
    convert(folder, tmp_path / "b", **request)
    tensors = tiny.read_folder(tmp_path / "b")
    change(tensors)
    tiny.write_folder(tmp_path / "c", tiny.read_config(tmp_path / "b"), tensors)
    assert difference(before, logits(tmp_path / "c")) > 10 * allowed(before)


def test_verification_stops_a_broken_conversion(
    sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Simulated queries without sqrt(D' / d): other scores, exit 3, and no folder."""
    features = sas._features
    monkeypatch.setattr(sas, "_features", lambda width, dim, factor: features(width, dim, 1.0))
    arguments = ["--to", "sas", "--simulated-head-dim", "12", "--quiet"]
    folder, _ = sources("gqa")
    assert main(["convert", str(folder), *arguments, "--out", str(tmp_path / "b")]) == 3
    assert not list(tmp_path.iterdir())
    assert "The logits differ" in capsys.readouterr().err


def test_a_wrong_map_does_not_leave_the_plan(
    sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiled key/value heads are refused on paper, before a byte is written."""
    tile = staticmethod(lambda size, new: kv_heads.AxisMap.tile(size, new // size))

    class Tiling(kv_heads.AxisMap):
        spread = tile  # type: ignore[assignment]

    monkeypatch.setattr(kv_heads, "AxisMap", Tiling)
    with pytest.raises(Exception, match="would move query heads to other kv heads"):
        convert(sources("gqa")[0], tmp_path / "b", to="mha")
    assert not list(tmp_path.iterdir())


def test_a_fold_with_the_lambda_of_another_layer_is_seen(
    sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(sources("gqa")[0], tmp_path / "b", to="gda")
    tensors, rng = tiny.read_folder(tmp_path / "b"), np.random.default_rng(0)
    for q1 in attention(tensors, "lambda_q1"):
        q1[:] = rng.standard_normal(DIM)
    moved = tiny.write_folder(tmp_path / "m", tiny.read_config(tmp_path / "b"), tensors)
    before, real = logits(moved), fold._lambda
    monkeypatch.setattr(fold, "_lambda", lambda c, f, layer: real(c, f, (layer + 1) % LAYERS))
    convert(moved, tmp_path / "folded", to="plain")
    assert difference(before, logits(tmp_path / "folded")) > 10 * allowed(before)


def test_blocks_of_a_calculated_tensor_do_not_matter(
    sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calculated tensor is the same whether its rows come in one block or one by one."""
    folder, _ = sources("mha")
    convert(folder, tmp_path / "b", to="mqa")
    monkeypatch.setattr("growkit.surgery.expand.BLOCK_ELEMENTS", 1)
    convert(folder, tmp_path / "c", to="mqa")
    one, other = (tiny.read_folder(tmp_path / name) for name in "bc")
    assert all(tiny.same_bits(one[name], other[name]) for name in one)
