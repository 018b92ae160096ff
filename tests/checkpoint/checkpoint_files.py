"""Small folders and raw safetensors files, good and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]


def make_tensors(seed: int = 0) -> Tensors:
    """One tensor of each shape that is easy to get wrong: scalar, empty, bf16, odd length."""
    rng = np.random.default_rng(seed)
    return {
        "model.layers.0.weight": rng.normal(size=(6, 4)).astype(np.float32),
        "model.layers.1.weight": rng.normal(size=(5, 3)).astype(ml_dtypes.bfloat16),
        "bias": rng.normal(size=(7,)).astype(np.float16),
        "scalar": np.array(2.5, dtype=np.float32),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "mask": np.array([True, False, True]),
        "ids": np.arange(3),
        "fp8": rng.normal(size=(9,)).astype(ml_dtypes.float8_e4m3fn),
        "größe": np.ones((2, 2)),
    }


def raw_file(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> Path:
    """A file with exactly this header (not checked) and these bytes after it."""
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def save_sharded(folder: Path, shards: dict[str, Tensors]) -> None:
    weight_map = {}
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Any) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
