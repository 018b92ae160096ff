"""Quantised checkpoints are named, by their config or by what they store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoints as tiny
from safetensors.numpy import save_file

from growkit.checkpoint import check_unquantised, open_checkpoint
from growkit.cli.main import main
from growkit.core.errors import UsageError

LAYER = "model.layers.0.mlp.gate_proj."
STATED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ, 4 bits"),
    "awq": ({"quant_method": "awq", "bits": 4, "zero_point": True}, "AWQ, 4 bits"),
    "bnb4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
    "bnb8": (
        {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True},
        "bitsandbytes 8-bit",
    ),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
    "compressed": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "compressed-tensors",
    ),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "MXFP4"),
    "newer": ({"quant_method": "tiny-1bit"}, "tiny-1bit"),
    "silent": ({"bits": 3}, "method not stated, 3 bits"),
}
U8, I32, FP8 = np.dtype(np.uint8), np.dtype(np.int32), np.dtype(ml_dtypes.float8_e4m3fn)
STORED: dict[str, tuple[str, np.dtype[Any], str]] = {
    "gptq": (LAYER + "qweight", I32, "GPTQ or AWQ"),
    "awq": (LAYER + "qzeros", I32, "GPTQ or AWQ"),
    "bnb4": (LAYER + "weight.quant_state.bitsandbytes__nf4", U8, "bitsandbytes 4-bit"),
    "bnb8": (LAYER + "SCB", np.dtype(np.float32), "bitsandbytes 8-bit"),
    "compressed": (LAYER + "weight_packed", I32, "compressed-tensors"),
    "fp8 scale": (LAYER + "weight_scale_inv", np.dtype(np.float32), "FP8"),
    "mxfp4": ("model.layers.0.mlp.experts.gate_up_proj_blocks", U8, "MXFP4"),
    "fp8": (LAYER + "weight", FP8, "FP8.*F8_E4M3"),
    "int8": (LAYER + "weight", np.dtype(np.int8), "whole numbers.*I8"),
}


def with_config(folder: Path, **changes: Any) -> Path:
    config = tiny.read_config(folder) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", STATED)
@pytest.mark.parametrize("known_family", [True, False])
def test_stated_quantisation(
    tmp_path: Path, name: str, known_family: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of an architecture without a family: quantisation is what has to go first."""
    stated, expected = STATED[name]
    folder = tiny.make_folder(tmp_path / "a", tiny.llama_config())
    with_config(folder, quantization_config=stated)
    if not known_family:
        with_config(folder, model_type="gpt_oss")
    for command in (
        ["inspect", str(folder)],
        ["plan", str(folder), "--ffn", "x2"],
        ["grow", str(folder), "--ffn", "x2", "--no-verify", "--out", str(tmp_path / "b")],
    ):
        assert main(command) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"is quantised: {expected} (quantization_config of config.json)" in error
        assert "Grow the unquantised checkpoint" in error
    assert not (tmp_path / "b").exists()


def test_a_config_without_weights_is_looked_at_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.llama_config(quantization_config={"quant_method": "awq"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--ffn", "x2"]) == 2
    assert "AWQ" in capsys.readouterr().err


@pytest.mark.parametrize("name", STORED)
def test_recognised_quantisation(tmp_path: Path, name: str) -> None:
    tensor, dtype, expected = STORED[name]
    folder = tiny.make_folder(tmp_path / "a", tiny.llama_config())
    tensors = tiny.read_folder(folder)
    tensors.pop(LAYER + "weight")
    save_file(tensors | {tensor: np.ones((4, 4)).astype(dtype)}, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint, pytest.raises(UsageError, match=expected) as error:
        check_unquantised(checkpoint)
    assert tensor in error.value.cause


@pytest.mark.parametrize("stated", [None, {}, [], "none"])
def test_what_is_not_quantised(tmp_path: Path, stated: Any) -> None:
    """Buffers of whole numbers and empty fields are none of it."""
    folder = tiny.make_folder(tmp_path / "a", tiny.llama_config(quantization_config=stated))
    tensors = tiny.read_folder(folder)
    ids = {"model.position_ids": np.arange(4), "model.causal_mask": np.ones(4, np.uint8)}
    save_file(tensors | ids, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        check_unquantised(checkpoint)
