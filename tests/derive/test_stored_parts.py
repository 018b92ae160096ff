"""Tensors beside those of a family's table: what no class reads, and parts of quantised weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import load_file, save_file

from growkit import verify
from growkit.cli.main import main

Tensors = dict[str, torch.Tensor]


def rewritten(folder: Path, change: Callable[[Tensors], Tensors], **config: object) -> Path:
    """The folder with other tensors and further fields of its config."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tiny.read_config(folder) | config))
    return folder


def with_prediction(tensors: Tensors) -> Tensors:
    """A further layer as DeepSeek-V3 stores it, and one beside the layers as Qwen3-Next does."""
    further = {n.replace(".1.", ".2."): a + 1 for n, a in tensors.items() if ".layers.1." in n}
    hidden = len(tensors["model.norm.weight"])
    joined = torch.ones(hidden, 2 * hidden)
    further["model.layers.2.eh_proj.weight"] = joined
    return {**tensors, **further, "mtp.fc.weight": joined.clone()}


@pytest.fixture
def predicting(tmp_path: Path) -> Path:
    folder = tiny.make_folder(tmp_path / "a", tiny.llama_config())
    return rewritten(folder, with_prediction, num_nextn_predict_layers=1)


def test_prediction_layers_follow_the_last_layer(predicting: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert main(["grow", str(predicting), "--layers", "+1", "--out", str(out)]) == 0  # verified
    before, after = (load_file(f / "model.safetensors") for f in (predicting, out))
    for name in ("eh_proj", "self_attn.q_proj", "mlp.up_proj"):
        old, new = (f"model.layers.{layer}.{name}.weight" for layer in (2, 3))
        assert torch.equal(before[old], after[new])
    assert torch.equal(before["mtp.fc.weight"], after["mtp.fc.weight"])
    assert "model.layers.2.eh_proj.weight" not in after
    assert tiny.read_config(out)["num_nextn_predict_layers"] == 1
    warnings = json.loads((out / "growkit.json").read_text())["plan"]["warnings"]
    assert any("11 tensors that the class does not read are copied" in text for text in warnings)


def test_a_width_that_they_have_too_is_refused_unless_they_are_dropped(
    predicting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["plan", str(predicting), "--ffn", "x2"]
    assert main(plan) == 2
    refused = " ".join(capsys.readouterr().err.split())
    assert "'model.layers.2.eh_proj.weight' and 10 more belong to layers that the class" in refused
    assert "--drop-tensors" in refused
    for pattern, cause in (("model.norm.weight", "matches no tensor"), ("(", "no regular expr")):
        assert main([*plan, "--drop-tensors", pattern]) == 2
        assert cause in " ".join(capsys.readouterr().err.split())
    out, pattern = tmp_path / "b", r"mtp\..*|model\.layers\.2\..*"
    grow = ["grow", str(predicting), *plan[2:], "--drop-tensors", pattern, "--out", str(out)]
    assert main([*grow, "--no-verify"]) == 0
    assert not any(".2." in name or "mtp" in name for name in load_file(out / "model.safetensors"))
    assert tiny.read_config(out)["num_nextn_predict_layers"] == 0
    assert json.loads((out / "growkit.json").read_text())["request"]["drop_tensors"] == pattern


def quantised(tensors: Tensors) -> Tensors:
    """FP8 blocks with their scales, as DeepSeek-V3 stores them."""
    result: Tensors = {}
    for name, array in tensors.items():
        result[name] = array
        if name.endswith("_proj.weight"):
            blocks = tuple(-(-size // 16) for size in array.shape)
            result[name] = (array * 20).to(torch.float8_e4m3fn)
            result[f"{name}_scale_inv"] = torch.full(blocks, 0.05)
    return result


STATED = {
    "quant_method": "fp8",
    "weight_block_size": [16, 16],
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head", "model.layers.1.input_layernorm"],
}


def test_blocks_are_copied_with_their_scales_and_no_width_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.make_folder(tmp_path / "a", tiny.llama_config())
    rewritten(folder, quantised, quantization_config=STATED)
    out = tmp_path / "b"
    grow = ["grow", str(folder), "--out", str(out)]
    assert main([*grow, "--layers", "x2", "--no-verify"]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    for name in ("self_attn.q_proj.weight", "self_attn.q_proj.weight_scale_inv"):
        old, new = before[f"model.layers.1.{name}"], after[f"model.layers.3.{name}"]
        assert old.dtype == new.dtype and bool(
            (old.view(torch.uint8) == new.view(torch.uint8)).all()
        )
    closed = after["model.layers.3.mlp.down_proj.weight"]
    assert closed.dtype == torch.float8_e4m3fn and not closed.view(torch.uint8).any()
    moved = tiny.read_config(out)["quantization_config"]["modules_to_not_convert"]
    assert moved == ["lm_head", *(f"model.layers.{i}.input_layernorm" for i in (2, 3))]
    shutil.rmtree(out)
    assert main([*grow, "--ffn", "x2"]) == 2
    refused = " ".join(capsys.readouterr().err.split())
    assert "is quantised (FP8), and --ffn changes single weights" in refused
    assert "FineGrainedFP8Config as C" in refused and not out.exists()


def test_a_scale_that_is_another_is_seen(tmp_path: Path) -> None:
    folder = tiny.make_folder(tmp_path / "a", tiny.llama_config())
    rewritten(folder, quantised, quantization_config=STATED)
    out = tmp_path / "b"
    assert main(["grow", str(folder), "--layers", "+1", "--out", str(out)]) == 0  # verified
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    rewritten(out, lambda tensors: {**tensors, name: tensors[name] * 2})
    assert not verify(folder, out).passed
