"""The dtype of the weights that a run leaves: the source's, or the one asked for. No torch here.

A run trains float32 weights by default, whatever the source is stored in; who loads the result
expects a folder like the one that went in. So every tensor is stored in the dtype of the source's
tensor of that name, rounded to nearest even, never widened. Entries that training did not touch
come back as the bytes that they were. Lambda vectors stay in float32 unless the source's dtype
holds their values exactly, and so does a tensor whose values float16 cannot hold.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from growkit.checkpoint import (
    DTYPES,
    INDEX_FILE,
    Checkpoint,
    OutputTensor,
    ShardWriter,
    open_checkpoint,
    plan_shards,
)
from growkit.core.names import CONFIG
from growkit.families.differential import is_lambda_vector
from growkit.record.plan_report import main_dtype, stored_dtypes

NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
MAX_SHARD_SIZE = 5 * 10**9


def store_in(folder: Path, dtype: str, source: Path | None) -> None:
    """Rewrite the weights of a written model folder in other dtypes, one tensor in memory.

    Args:
        folder: with config.json and safetensors files; unchanged where no dtype changes. Not
            atomic: for a folder that is not published yet.
        dtype: ``source``, ``float32``, ``bfloat16`` or ``float16``.
        source: the checkpoint that the run started from; None from scratch (``source`` then keeps
            what is written).
    """
    with open_checkpoint(folder) as written:
        targets = _targets(written, dtype, source)
        outputs = [
            OutputTensor(name, targets[name], info.shape) for name, info in written.tensors.items()
        ]
        if all(output.dtype == written.tensors[output.name].dtype for output in outputs):
            return
        shards = written.shards
        partial = folder / "typed.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with ShardWriter(partial, plan_shards(outputs, MAX_SHARD_SIZE)) as writer:
            for output in outputs:
                kind = DTYPES[output.dtype].numpy
                writer.write(output.name, 0, written.read(output.name).astype(kind))
        config = {**written.config, "dtype": _config_dtype(outputs)}
    for name in (*shards, INDEX_FILE):
        (folder / name).unlink(missing_ok=True)
    for path in partial.iterdir():
        os.replace(path, folder / path.name)
    partial.rmdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _config_dtype(outputs: list[OutputTensor]) -> str:
    sizes: dict[str, int] = {}
    for output in outputs:
        sizes[output.dtype] = sizes.get(output.dtype, 0) + int(np.prod(output.shape, dtype=int))
    stored = main_dtype(sizes)
    return next((name for name, short in NAMES.items() if short == stored), stored)


def _targets(written: Checkpoint, dtype: str, source: Path | None) -> dict[str, str]:
    """Tensor -> the dtype that it is to be stored in."""
    targets = {name: info.dtype for name, info in written.tensors.items()}
    floats = {name for name, stored in targets.items() if stored in {*NAMES.values(), "F64"}}
    if dtype != "source":
        for name in floats:
            if not is_lambda_vector(name, len(written.tensors[name].shape)):
                targets[name] = NAMES[dtype]
    elif source is not None:
        targets |= _as_source(written, floats, source)
    for name, target in targets.items():
        stored = written.tensors[name].dtype
        if target == "F16" != stored and _overflows(written.read(name)):
            targets[name] = stored
    return targets


def _as_source(written: Checkpoint, floats: set[str], source: Path) -> dict[str, str]:
    targets = {}
    with open_checkpoint(source) as origin:
        usual = main_dtype(stored_dtypes(origin))
        for name in floats:
            info = written.tensors[name]
            target = origin.tensors[name].dtype if name in origin.tensors else usual
            if target not in NAMES.values() or DTYPES[target].bits >= DTYPES[info.dtype].bits:
                continue
            if is_lambda_vector(name, len(info.shape)) and _rounds(written.read(name), target):
                continue
            targets[name] = target
    return targets


def _overflows(values: np.ndarray[Any, Any]) -> bool:
    """Whether float16 makes a finite value infinite."""
    with np.errstate(over="ignore"):
        return not np.array_equal(np.isfinite(values.astype(np.float16)), np.isfinite(values))


def _rounds(values: np.ndarray[Any, Any], dtype: str) -> bool:
    """Whether a dtype does not hold the values exactly."""
    return not np.array_equal(values.astype(DTYPES[dtype].numpy).astype(values.dtype), values)
