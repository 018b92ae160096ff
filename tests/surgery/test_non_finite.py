"""NaN and infinity in the source: a warning with the source tensor's name, however it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoints as tiny

from growkit.checkpoint import DTYPES
from growkit.surgery.source_checks import all_finite

LAYER = "model.layers.1."


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E5M2", "F8_E4M3"])
def test_every_pattern_is_judged_like_isfinite(dtype: str) -> None:
    kind = DTYPES[dtype].numpy
    assert kind is not None
    patterns = np.arange(1 << (8 * kind.itemsize), dtype=f"u{kind.itemsize}").view(kind)
    for value in patterns:
        expected = bool(np.isfinite(value.astype(np.float32)))
        assert all_finite(np.array([1, value, -1], kind), dtype) == expected


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_wide_floats(dtype: str) -> None:
    kind = tiny.NUMPY[dtype]
    info = np.finfo(kind)
    finite = np.array([info.max, info.min, info.tiny, info.smallest_subnormal, -0.0], kind)
    assert all_finite(finite, dtype)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        assert not all_finite(np.append(finite, kind.type(bad)), dtype)


def test_integers_have_no_nan() -> None:
    assert all_finite(np.array([-1], np.int64), "I64")
    assert all_finite(np.empty(0, ml_dtypes.bfloat16), "BF16")


def warnings_of(tmp_path: Path, bad: dict[str, float], dtype: str, **request: Any) -> list[str]:
    """Warnings of growing a checkpoint with these values somewhere in these tensors."""
    config = tiny.gda_config(hidden_size=64, intermediate_size=96)
    tensors = tiny.make_tensors(config, dtype)
    for name, value in bad.items():
        tensors[name].reshape(-1)[-3] = value
    tiny.write_folder(tmp_path / "source", config, tensors, shards=2)
    warnings: list[str] = []
    tiny.grow(tmp_path / "source", tmp_path / "out", threads=2, warn=warnings.append, **request)
    return sorted(warnings)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",  # copied whole
        LAYER + "self_attn.q_proj.weight",  # rows copied to several places
        LAYER + "self_attn.o_proj.weight",  # computed
        LAYER + "mlp.down_proj.weight",
        LAYER + "input_layernorm.weight",  # a vector
    ],
)
@pytest.mark.parametrize(
    "request_", [{"signal_heads": "x3"}, {"layers": "+2"}, {"hidden": "x2", "layers": "+3"}]
)
def test_the_tensor_is_named_once(
    tmp_path: Path, name: str, dtype: str, value: float, request_: dict[str, Any]
) -> None:
    (warning,) = warnings_of(tmp_path, {name: value}, dtype, **request_)
    assert repr(name) in warning


def test_every_bad_tensor_is_named(tmp_path: Path) -> None:
    names = [LAYER + "mlp.up_proj.weight", "lm_head.weight"]
    found = warnings_of(tmp_path, dict.fromkeys(names, np.nan), "F32", signal_heads="x2")
    assert len(found) == 2
    assert all(any(repr(name) in warning for warning in found) for name in names)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_largest_numbers_are_no_reason_to_warn(tmp_path: Path, dtype: str) -> None:
    """Their sum would overflow; one by one they are finite."""
    largest = float(ml_dtypes.finfo(tiny.NUMPY[dtype]).max)
    names = ["model.embed_tokens.weight", LAYER + "self_attn.o_proj.weight"]
    config = tiny.gda_config()
    tensors = tiny.make_tensors(config, dtype)
    for name in names:
        tensors[name][:] = largest
    tiny.write_folder(tmp_path / "source", config, tensors)
    warnings: list[str] = []
    tiny.grow(tmp_path / "source", tmp_path / "out", warn=warnings.append, signal_heads="x2")
    assert warnings == []
