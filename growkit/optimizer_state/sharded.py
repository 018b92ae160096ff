"""Sharded state of torch.distributed.checkpoint (FSDP), read in one process, a tensor at a time.

torch unpickles such folders without restriction; here :mod:`growkit.optimizer_state.dcp_index`
reads the index, and single values are loaded with ``weights_only=True``.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

from growkit.core.errors import CheckpointError
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
from growkit.optimizer_state.torch_files import as_array, dtype_name


def read_sharded(folder: Path) -> OptimizerState | None:
    """The optimizer state in a DCP folder; None when it holds none (model weights alone).

    Keys are ``[prefix.]state.<parameter>.<moment>``, as ``get_optimizer_state_dict`` makes them
    (accelerate and Trainer: ``optimizer_0/``, torchtitan and own scripts: beside the model).

    Raises:
        CheckpointError: damaged, or moments of an unknown kind.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from growkit.optimizer_state.dcp_index import read_index

    metadata = read_index(folder)
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
                if not isinstance(entry, TensorStorageMetadata):
                    raise CheckpointError(f"{key!r} in {str(folder)!r} is no tensor.", RESET)
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
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from growkit.optimizer_state.dcp_index import Planner, Reader, load

    values: dict[str, Any] = {}

    class OneValue(Planner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            values[key] = torch.load(value, weights_only=True)

    entry = metadata.state_dict_metadata[key]
    target: dict[str, Any] = {key: None}
    if isinstance(entry, TensorStorageMetadata):
        try:
            target[key] = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        except (RuntimeError, MemoryError, TypeError) as error:
            shape = f"{entry.properties.dtype} {tuple(entry.size)}"
            raise CheckpointError(
                f"{key!r} in {str(folder)!r} does not fit into memory: {shape[:200]}.", RESET
            ) from error
    load(target, Reader(folder, metadata), OneValue(), no_dist=True)
    return values.get(key, target[key])
