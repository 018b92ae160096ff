# SPDX-License-Identifier: Apache-2.0
"""Tensors that no model has: ``growkit diff`` compares what can be compared and ends in order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
from safetensors.numpy import load_file, save_file

from growkit.checkpoint import open_checkpoint
from growkit.diff.folders import diff_checkpoints


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.make_folder(tmp_path / "a", tiny.llama_config())


def test_numbers_of_5000_digits_in_names(source: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(source, tmp_path / "b"))
    renamed = {
        name.replace("layers.0", "layers." + "9" * 5000): tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(renamed, other / "model.safetensors")
    for first, second in ((source, other), (other, source), (other, other)):
        with open_checkpoint(first) as a, open_checkpoint(second) as b:
            json.dumps(diff_checkpoints(a, b))


def packed(folder: Path, name: str) -> None:
    """Store one tensor as F4: half a byte an entry, the shape as before."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    shape = tensors[name].shape
    save_file(tensors | {name: np.zeros(tensors[name].size // 2, np.uint8)}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[name] |= {"dtype": "F4", "shape": list(shape)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def test_a_dtype_of_another_size(source: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    other = Path(shutil.copytree(source, tmp_path / "b"))
    packed(other, name)
    for first, second, same in (
        (source, other, False),
        (other, source, False),
        (other, other, True),
    ):
        with open_checkpoint(first) as a, open_checkpoint(second) as b:
            groups = diff_checkpoints(a, b)["groups"]
        statuses = {group["status"] for group in groups if "q_proj" in group["tensor"]}
        assert ("different" in statuses) is not same
