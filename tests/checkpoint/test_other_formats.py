"""Folders without safetensors: the remedy is one line, and the line works."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import family_config, write_checkpoint, write_t5
from safetensors.torch import load_file

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError


def pickled(folder: Path, shards: int = 1) -> Path:
    """The folder with pytorch_model.bin in place of safetensors, as older tools wrote it."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        name = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = {key: tensors[key] for key in names[shard::shards]}
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def refusal(folder: Path) -> UsageError:
    with pytest.raises(UsageError) as refused:
        open_checkpoint(folder)
    return refused.value


@pytest.mark.parametrize("case", ["sharded t5", "no architectures", "odd name"])
def test_pickled_weights_and_the_line_that_converts_them(tmp_path: Path, case: str) -> None:
    name = 'it\'s a "model"' if case == "odd name" else "model"
    if case == "sharded t5":
        folder = write_t5(tmp_path / name, dtype=torch.bfloat16)
    else:
        folder = write_checkpoint(tmp_path / name, family_config("llama"), torch.bfloat16)
    before = load_file(folder / "model.safetensors")
    pickled(folder, 2 if case == "sharded t5" else 1)
    if case == "no architectures":
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
    error = refusal(folder)
    assert "pytorch_model.bin" in error.cause and repr(str(folder)) in error.cause
    command = error.remedy.removeprefix("Convert it by: ")
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"] and "\n" not in command
    if case == "odd name":
        run = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    else:
        exec(words[2], {})
    with open_checkpoint(Path(f"{folder}-safetensors")) as converted:
        assert set(converted.tensors) == set(before)
    after = load_file(f"{folder}-safetensors/model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(after[key].dtype == value.dtype for key, value in before.items())


def test_a_tokenizer_is_converted_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "AutoModelForCausalLM" in refusal(tmp_path).remedy
    assert "T.from_pretrained" not in refusal(tmp_path).remedy
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "T.from_pretrained" in refusal(tmp_path).remedy


def test_architectures_are_never_run_as_code(tmp_path: Path) -> None:
    config = {"architectures": ["M; import os; os.abort()"], "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    remedy = refusal(tmp_path).remedy
    assert "abort" not in remedy and "AutoModelForSeq2SeqLM" in remedy


@pytest.mark.parametrize("with_config", [True, False])
def test_adapters(tmp_path: Path, with_config: bool) -> None:
    if with_config:
        (tmp_path / "config.json").write_text("{}")
    base = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    error = refusal(tmp_path)
    assert "adapter of 'org/base', not a whole model" in error.cause
    assert "merge_and_unload().save_pretrained" in error.remedy
    compile(shlex.split(error.remedy.removeprefix("Merge it by: "))[2], "line", "exec")


def test_an_adapter_beside_a_model_is_no_obstacle(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", family_config("llama"))
    (folder / "adapter_config.json").write_text("{}")
    open_checkpoint(folder).close()


@pytest.mark.parametrize("with_config", [True, False])
def test_gguf(tmp_path: Path, with_config: bool) -> None:
    if with_config:
        (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    error = refusal(tmp_path)
    assert "'model.Q4_K_M.gguf'" in error.cause and "safetensors checkpoint" in error.remedy


@pytest.mark.parametrize(
    ("file", "kind"),
    [("tf_model.h5", "TensorFlow"), ("flax_model.msgpack", "Flax"), ("model.onnx", "ONNX")],
)
def test_further_formats(tmp_path: Path, file: str, kind: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(b"")
    assert kind in refusal(tmp_path).cause


def test_a_hub_model_without_safetensors(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--old-model" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    error = refusal(snapshot)
    assert "'org/old-model' has no safetensors weights" in error.cause
    assert "from_pretrained('org/old-model', dtype='auto')" in error.remedy
    assert "GPT2LMHeadModel" in error.remedy
