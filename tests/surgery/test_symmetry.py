"""Shares of a weight: exact sums for every number that a checkpoint can hold."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny

from growkit.surgery import symmetry
from growkit.surgery.symmetry import Symmetry, shares, split

SPLIT, EVEN = Symmetry("split"), Symmetry("even")
COPIES = range(2, 9)


def every_finite(dtype: str) -> tiny.Array:
    """All finite values of a 16-bit dtype: both zeros, subnormals and extremes among them."""
    values = np.arange(1 << 16, dtype=np.uint16).view(tiny.NUMPY[dtype])
    return values[np.isfinite(values.astype(np.float32))][None]


def total(parts: list[tiny.Array]) -> tiny.Array:
    """The exact sum: 8 copies of 24 bits fit into float64."""
    result: tiny.Array = np.sum([part.astype(np.float64) for part in parts], axis=0)
    return result


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_split_is_exact_for_every_16_bit_number(dtype: str, copies: int) -> None:
    weights = every_finite(dtype)
    for draw in range(3):
        parts = shares(weights, copies, Symmetry("split", seed=draw), "w", draw)
        assert len(parts) == copies
        assert all(part.dtype == weights.dtype for part in parts)
        assert (total(parts) == weights.astype(np.float64)).all()


@pytest.mark.parametrize("remaining", COPIES)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_step_is_exact_for_every_number_and_every_random_byte(
    dtype: str, remaining: int
) -> None:
    """All that can happen: a copy is peeled off a 16-bit number by one random byte."""
    weights = every_finite(dtype)
    weights = weights[~np.signbit(weights)]
    wide = weights.astype(np.float32)
    for byte in range(256):
        rest, peeled = split(weights, remaining, np.full(weights.shape, byte, np.uint8))
        a, b = rest.astype(np.float32), peeled.astype(np.float32)
        # Both are non-negative and below the weight, so the sum of two 16-bit numbers is exact.
        assert (a + b == wide).all()
        assert min(a.min(), b.min()) >= 0


@pytest.mark.parametrize("bits", [0, 1, 0xFFFE, 0xFFFF])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_split_is_exact_at_the_ends_of_the_random_range(
    monkeypatch: pytest.MonkeyPatch, dtype: str, bits: int
) -> None:
    """The smallest and the largest share, of the smallest and the largest numbers."""

    def constant(seed: int, name: str, position: int, count: int) -> tiny.Array:
        return np.full(count, bits, np.uint16)

    monkeypatch.setattr(symmetry, "random_bits", constant)
    if dtype in ("BF16", "F16"):
        weights = every_finite(dtype)
    else:
        info = np.finfo(tiny.NUMPY[dtype])
        edges = [info.max, info.tiny, info.smallest_subnormal, 1.0, 1.0 - info.eps, 0.0]
        weights = np.array([[*edges, *[-e for e in edges]]], dtype=tiny.NUMPY[dtype])
    for copies in COPIES:
        parts = shares(weights, copies, SPLIT, "w", 0)
        assert all(np.isfinite(part.astype(np.float64)).all() for part in parts)
        for index in range(weights.shape[1]) if dtype == "F64" else []:
            exact = sum(Fraction(float(part[0, index])) for part in parts)
            assert exact == Fraction(float(weights[0, index]))
        if dtype != "F64":
            assert (total(parts) == weights.astype(np.float64)).all()


@pytest.mark.parametrize("copies", COPIES)
def test_split_is_exact_for_random_float32(copies: int) -> None:
    rng = np.random.default_rng(copies)
    values = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values)][None]
    parts = shares(values, copies, SPLIT, "w", 0)
    assert (total(parts) == values.astype(np.float64)).all()


@pytest.mark.parametrize("copies", [2, 3, 5, 8])
def test_split_is_exact_for_random_float64(copies: int) -> None:
    rng = np.random.default_rng(copies)
    values = rng.integers(0, 1 << 64, 400, dtype=np.uint64).view(np.float64)
    values = values[np.isfinite(values)][None]
    parts = shares(values, copies, SPLIT, "w", 0)
    for index, value in enumerate(values[0]):
        assert sum(Fraction(float(p[0, index])) for p in parts) == Fraction(float(value))


def test_a_rounded_split_would_be_caught() -> None:
    """The negative control: shares that are rounded on their own do not sum to the weight."""
    weights = every_finite("BF16")
    fraction = np.random.default_rng(0).uniform(size=weights.shape)
    wide = weights.astype(np.float64)
    parts = [(wide * f).astype(weights.dtype) for f in (fraction, 1 - fraction)]
    assert (total(parts) != wide).mean() > 0.3


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("copies", COPIES)
def test_every_copy_gets_its_part_on_average_and_differs(copies: int, dtype: str) -> None:
    weights = np.ones((100, 200), tiny.NUMPY[dtype])
    parts = shares(weights, copies, SPLIT, "w", 0)
    for part in parts:
        wide = part.astype(np.float64)
        assert abs(wide.mean() - 1 / copies) < 0.01
        assert wide.std() > 0.25 / copies
        assert wide.min() >= 0 and wide.max() <= 1
    distinct = {part.tobytes() for part in parts}
    assert len(distinct) == copies


@pytest.mark.parametrize("copies", [2, 4, 8])
def test_even_is_lossless_for_powers_of_two(copies: int) -> None:
    for dtype in ("BF16", "F16"):
        weights = every_finite(dtype)
        smallest_normal = float(np.float32(2.0**-126 if dtype == "BF16" else 2.0**-14))
        normal = np.abs(weights.astype(np.float64)) >= smallest_normal * copies
        parts = shares(weights, copies, EVEN, "w", 0)
        assert all(tiny.same_bits(part, parts[0]) for part in parts)
        assert (total(parts) == weights.astype(np.float64))[normal].all()


def test_even_thirds_are_rounded() -> None:
    parts = shares(every_finite("BF16"), 3, EVEN, "w", 0)
    assert (total(parts) != every_finite("BF16").astype(np.float64)).mean() > 0.3


@pytest.mark.parametrize("snr", [0.0, 10.0, 30.0])
@pytest.mark.parametrize("copies", [2, 3, 4])
def test_noise_has_the_stated_size_and_cancels(copies: int, snr: float) -> None:
    rng = np.random.default_rng(0)
    # Rows of very different size: the noise is relative to its row.
    weights = (rng.normal(size=(8, 4000)) * 10.0 ** np.arange(-4, 4)[:, None]).astype(np.float32)
    parts = shares(weights, copies, Symmetry("noise", snr), "w", 0)
    share = weights / copies
    for row in range(8):
        signal = np.mean(share[row].astype(np.float64) ** 2)
        for part in parts:
            noise = np.mean((part[row].astype(np.float64) - share[row]) ** 2)
            assert abs(10 * math.log10(signal / noise) - snr) < 0.5
    scale = np.abs(weights).max(axis=1, keepdims=True)
    assert (np.abs(total(parts) - weights) / scale).max() < 1e-6


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [
        ("float64", "c8f6923f8f8df084 eb9393f1deccf479 9877d8adb219dbe6"),
        ("float32", "bb76420e83162077 83b020aec90c4ef2 f8e20f1aa36c93f5"),
        ("float16", "944a6fd1f615641b 2344d137b8e3be22 ffe8bd3538330f28"),
        ("bfloat16", "61f1e783a19583a9 6bbc5b06f2099e02 5fcf34e5ceecc6d9"),
    ],
)
def test_a_split_is_the_same_bytes_in_every_version_and_place(dtype: str, digest: str) -> None:
    """For two, three and five copies; new arrays, and every other column of one that is there."""
    weights = (np.random.default_rng(0).standard_normal((7, 33)) * 0.1).astype(np.dtype(dtype))
    for copies, expected in zip((2, 3, 5), digest.split(), strict=True):
        there = np.zeros((7, 66 * copies), weights.dtype)
        out = [there[:, 66 * i : 66 * (i + 1) : 2] for i in range(copies)]
        shares(weights, copies, Symmetry(), "w", 3, out)
        for parts in (shares(weights, copies, Symmetry(), "w", 3), out):
            joined = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
            assert hashlib.sha256(joined).hexdigest()[:16] == expected


def test_one_copy_keeps_everything() -> None:
    weights = every_finite("F16")
    (only,) = shares(weights, 1, SPLIT, "w", 0)
    assert tiny.same_bits(only, weights)


@pytest.fixture(scope="module")
def wide_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several blocks a tensor, several shards."""
    config = tiny.gda_config(hidden_size=64, intermediate_size=3000, num_hidden_layers=1)
    return tiny.make_folder(tmp_path_factory.mktemp("wide") / "source", config, "BF16", shards=2)


REQUEST: dict[str, Any] = {"signal_heads": "x2", "ffn": "+1000", "hidden": "x2"}


@pytest.mark.parametrize("mode", ["split", "noise"])
def test_bytes_depend_on_the_seed_alone(wide_source: Path, tmp_path: Path, mode: str) -> None:
    request = REQUEST | {"symmetry": mode}
    tiny.grow(wide_source, tmp_path / "a", threads=1, max_shard_size="5GB", **request)
    tiny.grow(wide_source, tmp_path / "b", threads=4, max_shard_size="200KB", **request)
    tiny.grow(wide_source, tmp_path / "c", threads=4, seed=1, **request)
    a, b, c = (tiny.read_folder(tmp_path / name) for name in "abc")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert a.keys() == b.keys() == c.keys()
    assert all(tiny.same_bits(a[name], b[name]) for name in a)
    different = {name.split(".")[-2] for name in a if not tiny.same_bits(a[name], c[name])}
    readers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert different == readers | {"lm_head"}


def test_single_runs_repeat(wide_source: Path, tmp_path: Path) -> None:
    for name in "ab":
        tiny.grow(wide_source, tmp_path / name, threads=4, **REQUEST)
    for file in ("model.safetensors", "config.json", "growkit.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_layers_and_rows_get_different_shares(tmp_path: Path) -> None:
    """The random numbers of one tensor or row are not those of another."""
    config = tiny.gda_config()
    tensors = tiny.make_tensors(config)
    names = [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)]
    for name in names:
        tensors[name] = np.ones_like(tensors[name])
    tiny.write_folder(tmp_path / "a", config, tensors)
    tiny.grow(tmp_path / "a", tmp_path / "b", signal_heads="x2")
    grown = tiny.read_folder(tmp_path / "b")
    first, second = (grown[name] for name in names)
    assert (first != second).mean() > 0.9
    assert (first[0] != first[1]).mean() > 0.9
