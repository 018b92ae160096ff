"""Sharded state of torch.distributed.checkpoint (FSDP), read in one process, a tensor at a time.

torch unpickles such folders without restriction; a checkpoint may have been downloaded, so here the
index may name nothing but the classes that describe tensors, and single values are loaded with
``weights_only=True``.
"""

from __future__ import annotations

import io
import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from growkit.errors import CheckpointError
from growkit.optimizer_state.parameter_names import plain_name
from growkit.optimizer_state.source import (
    COUNTER,
    RESET,
    Array,
    Moment,
    OptimizerState,
    ParameterState,
    check_kinds,
    counter,
    plain_options,
)
from growkit.optimizer_state.torch_array import as_array, dtype_name

METADATA = ".metadata"
_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
}
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import torch

        plain = "." not in name and not name.startswith("__")
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if plain and ((module, name) in _CLASSES or module == _METADATA_MODULE or dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs")


def _read_metadata(folder: Path) -> Any:
    try:
        return _IndexUnpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
    except Exception as error:  # damaged pickles fail in many ways
        raise CheckpointError(f"{str(folder)!r} cannot be read: {error}.", RESET) from error


def read_sharded(folder: Path) -> OptimizerState | None:
    """The optimizer state in a DCP folder; None when it holds none (model weights alone).

    Keys are ``[prefix.]state.<parameter>.<moment>``, as ``get_optimizer_state_dict`` makes them
    (accelerate and Trainer: ``optimizer_0/``, torchtitan and own scripts: beside the model).

    Raises:
        CheckpointError: damaged, or moments of an unknown kind.
    """
    metadata = _read_metadata(folder)
    paths = metadata.planner_data or {}
    found: dict[str, dict[str, str]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key in metadata.state_dict_metadata:
        path = [str(part) for part in paths.get(key, key.split("."))]
        if "param_groups" in path:
            after = path[path.index("param_groups") + 1 :]
            if len(after) == 2 and after[0].isdigit() and after[1] not in ("params", "param_names"):
                groups.setdefault(after[0], {})[after[1]] = _read(folder, metadata, key)
        elif "state" in path and len(path) > path.index("state") + 2:
            after = path[path.index("state") + 1 :]
            found.setdefault(plain_name(".".join(after[:-1])), {})[after[-1]] = key
    if not found:
        return None
    states = {}
    for name, keys in found.items():
        check_kinds(keys, name, folder.name)
        step = counter(_read(folder, metadata, keys[COUNTER])) if COUNTER in keys else None
        moments = {}
        for kind, key in keys.items():
            if kind != COUNTER:
                entry = metadata.state_dict_metadata[key]
                dtype = dtype_name(entry.properties.dtype, f"{kind} of {name!r}")
                read = partial(_array, folder, metadata, key)
                moments[kind] = Moment(tuple(entry.size), dtype, read)
        states[name] = ParameterState(moments, step)
    return OptimizerState(
        "dcp", folder, states, tuple(plain_options(group) for group in groups.values())
    )


def _array(folder: Path, metadata: Any, key: str) -> Array:
    return as_array(_read(folder, metadata, key))


def _read(folder: Path, metadata: Any, key: str) -> Any:
    """One entry, whole."""
    import torch
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    values: dict[str, Any] = {}

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            values[key] = torch.load(value, weights_only=True)

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return metadata

    entry = metadata.state_dict_metadata[key]
    target: dict[str, Any] = {key: None}
    if isinstance(entry, TensorStorageMetadata):
        target[key] = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no process group is there
            load(target, storage_reader=Reader(folder), planner=Planner(), no_dist=True)
    except (Exception, CheckpointException) as error:  # missing or torn files; no Exception is it
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{key!r} in {str(folder)!r} cannot be read: {reason}.", RESET
        ) from error
    return values.get(key, target[key])
