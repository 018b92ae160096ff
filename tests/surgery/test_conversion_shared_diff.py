"""Ordinary attention -> Shared DIFF with updates of the keys: values get a second, silent half."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from converted import LAYERS, allowed, convert, difference, logits, write_source

from growkit.cli.main import main
from growkit.record.manifest import read_manifest

DIM, KV, HEADS, HIDDEN = 8, 2, 4, 32
KEYS: dict[str, Any] = {"to": "shared_diff", "rank": 2, "key_rank": 3}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Biases on q, k and v, 4 query heads on 2 key/value heads."""
    path = write_source(tmp_path_factory.mktemp("sources") / "a", "qwen2")
    return path, logits(path)


def attention(tensors: tiny.Tensors, name: str, layer: int = 1) -> tiny.Array:
    return tensors[f"model.layers.{layer}.self_attn.{name}"]


@pytest.mark.parametrize("rank", [1, 5, DIM])
@pytest.mark.parametrize("key_rank", [0, 1, 4, DIM])
def test_every_pair_of_ranks_keeps_the_function(
    source: tuple[Path, torch.Tensor], tmp_path: Path, rank: int, key_rank: int
) -> None:
    folder, before = source
    plan = convert(folder, tmp_path / "b", "shared_diff", rank=rank, key_rank=key_rank)
    assert plan.exactness.value == "exact"
    config = tiny.read_config(tmp_path / "b")
    assert (config["query_rank"], config["key_rank"]) == (rank, key_rank)
    assert config["num_key_value_heads"] == (2 * KV if key_rank else KV)
    assert difference(before, logits(tmp_path / "b")) <= allowed(before)


def test_tensors_are_the_sources_beside_new_ones(
    source: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    """Against the layout in the docstring of variants/shared_diff/attention.py, head by head."""
    convert(source[0], tmp_path / "b", **KEYS)
    old, new = tiny.read_folder(source[0]), tiny.read_folder(tmp_path / "b")
    for name in ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"):
        assert tiny.same_bits(attention(old, name), attention(new, name))
    values = attention(new, "v_proj.weight").reshape(KV, 2, DIM, HIDDEN)
    for head in range(KV):
        rows = attention(old, "v_proj.weight")[head * DIM : (head + 1) * DIM]
        np.testing.assert_array_equal(values[head, 0], rows)
        bias = attention(old, "v_proj.bias")[head * DIM : (head + 1) * DIM]
        found = attention(new, "v_proj.bias").reshape(KV, 2, DIM)[head]
        np.testing.assert_array_equal(found, [bias, np.zeros(DIM)])
    std = tiny.read_config(source[0])["initializer_range"]
    assert values[:, 1].std() == pytest.approx(std, rel=0.2)
    columns = attention(new, "o_proj.weight").reshape(HIDDEN, HEADS, 2, DIM)
    for head in range(HEADS):
        read = attention(old, "o_proj.weight")[:, head * DIM : (head + 1) * DIM]
        np.testing.assert_array_equal(columns[:, head, 0], 2 * read)
    assert not columns[:, :, 1].any()
    assert not attention(new, "k_up.weight").any() and attention(new, "k_down.weight").any()
    manifest = read_manifest(tmp_path / "b")
    assert manifest is not None
    halves = [[8, 16], [24, 32]]
    at = "model.layers.1.self_attn."
    assert manifest["new_parameters"][at + "v_proj.weight"] == {"rows": halves}
    halves = [[8, 16], [24, 32], [40, 48], [56, 64]]
    assert manifest["new_parameters"][at + "o_proj.weight"] == {"columns": halves}


def halves_swapped(tensors: tiny.Tensors) -> None:
    """The value's second half where its first belongs."""
    for layer in range(LAYERS):
        values = attention(tensors, "v_proj.weight", layer).reshape(KV, 2, DIM, HIDDEN)
        values[:] = values[:, ::-1].copy()


def values_of_all_heads_first(tensors: tiny.Tensors) -> None:
    """DiffLlama's order: (half, head) instead of (head, half)."""
    for layer in range(LAYERS):
        values = attention(tensors, "v_proj.weight", layer)
        heads = values.reshape(KV, 2, DIM, HIDDEN)
        values[:] = heads.swapaxes(0, 1).reshape(values.shape).copy()


def new_columns_speak(tensors: tiny.Tensors) -> None:
    for layer in range(LAYERS):
        columns = attention(tensors, "o_proj.weight", layer).reshape(HIDDEN, HEADS, 2, DIM)
        columns[:, :, 1] = 0.1


def updates_of_keys_speak(tensors: tiny.Tensors) -> None:
    for layer in range(LAYERS):
        attention(tensors, "k_up.weight", layer)[:] += 0.3


def factor_missing(tensors: tiny.Tensors) -> None:
    for layer in range(LAYERS):
        attention(tensors, "o_proj.weight", layer)[:] /= 2


@pytest.mark.parametrize(
    "change",
    [
        halves_swapped,
        values_of_all_heads_first,
        new_columns_speak,
        updates_of_keys_speak,
        factor_missing,
    ],
)
def test_a_broken_conversion_is_seen(
    source: tuple[Path, torch.Tensor], tmp_path: Path, change: Callable[[tiny.Tensors], None]
) -> None:
    convert(source[0], tmp_path / "b", **KEYS)
    tensors = tiny.read_folder(tmp_path / "b")
    change(tensors)
    tiny.write_folder(tmp_path / "c", tiny.read_config(tmp_path / "b"), tensors)
    assert main(["verify", str(source[0]), str(tmp_path / "b"), "--quiet"]) == 0
    assert main(["verify", str(source[0]), str(tmp_path / "c"), "--quiet"]) == 3


def test_the_command_proves_it_and_the_result_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out, grown = write_source(tmp_path / "a", "qwen3"), tmp_path / "b", tmp_path / "c"
    ranks = ["--rank", "2", "--key-rank", "3"]
    assert main(["convert", str(folder), "--to", "shared_diff", *ranks, "--out", str(out)]) == 0
    assert "verification passed" in capsys.readouterr().out
    assert main(["diff", str(folder), str(out)]) == 0
    assert "every part is what its plan says" in capsys.readouterr().out
    tiny.grow(out, grown, query_heads="x2", kv_heads="x2", layers="+1")
    assert main(["verify", str(folder), str(grown), "--quiet"]) == 0


@pytest.mark.parametrize("ranks", [("0", "0"), ("9", "2"), ("2", "9"), ("2", "-1")])
def test_ranks_that_a_head_cannot_have_are_refused(
    source: tuple[Path, torch.Tensor],
    tmp_path: Path,
    ranks: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--rank", ranks[0], "--key-rank", ranks[1], "--out", str(tmp_path / "b")]
    assert main(["convert", str(source[0]), "--to", "shared_diff", *arguments]) == 2
    assert "head of 8 channels" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("mirror", ["1", "-inf", "nan"])
def test_a_lambda_that_leaves_nothing_is_refused(
    source: tuple[Path, torch.Tensor],
    tmp_path: Path,
    mirror: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--rank", "2", f"--mirror={mirror}", "--out", str(tmp_path / "b")]
    assert main(["convert", str(source[0]), "--to", "shared_diff", *arguments]) == 2
    assert "(1 - lambda)" in capsys.readouterr().err
