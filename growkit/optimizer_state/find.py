"""Which optimizer state lies beside a checkpoint, whole or sharded.

Sharded state of torch.distributed.checkpoint (FSDP), read in one process, a tensor at a time.

torch unpickles such folders without restriction; here :mod:`growkit.optimizer_state.dcp_index`
reads the index, and single values are loaded with ``weights_only=True``.

Where a checkpoint's optimizer state lies, whoever saved it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from growkit.core.errors import CheckpointError, UsageError
from growkit.core.names import OPTIMIZER
from growkit.optimizer_state.parameter_names import Named, model_parameters, plain_name
from growkit.optimizer_state.source import (
    COUNTER,
    METADATA,
    RESET,
    Array,
    Moment,
    OptimizerState,
    ParameterState,
    check_kinds,
    counter,
    plain_options,
)
from growkit.optimizer_state.store import FOLDER, INDEX, read_store
from growkit.optimizer_state.torch_files import as_array, dtype_name, read_torch_files
from growkit.record.manifest import read_training_record


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


LAYOUTS = (
    "growkit_optimizer/ (a grown folder), optimizer.pt (Trainer), optimizer.bin (accelerate, FSDP "
    "full state), optimizer_0/ of torch.distributed.checkpoint (FSDP sharded; another folder has "
    "to be named), or the last checkpoint under training/ (a growkit run)"
)
_DEEPSPEED = re.compile(r"global_step\d+")
_SHARDED = re.compile(r"optimizer(_\d+)?")
_PER_RANK = re.compile(r"optimizer_\d+_rank\d+\.bin|rank\d+-of-\d+-optimizer\.pt")


def find_state(checkpoint: Path, folder: Path | None = None) -> OptimizerState | None:
    """The optimizer state that belongs to a checkpoint folder, opened; None when there is none.

    Args:
        checkpoint: folder of the weights; its config gives the order of parameters.
        folder: where the state lies, when not beside the weights (an accelerate ``save_state``
            folder without config.json, say).

    Raises:
        UsageError: ``folder`` is given and holds none.
        CheckpointError: there is one, and it is damaged or of a kind that cannot be grown.
    """

    @cache
    def parameters() -> Named:
        return model_parameters(checkpoint)

    place = folder or checkpoint
    if not place.is_dir():
        raise UsageError(f"There is no folder {str(place)!r}.", f"It has to hold {LAYOUTS}.")
    for candidate in (place, last_of_run(place)):
        if candidate is None:
            continue
        state = _in_folder(candidate, parameters)
        if state is not None:
            return state
    if folder is not None:
        raise UsageError(f"{str(folder)!r} holds no optimizer state.", f"It has to hold {LAYOUTS}.")
    return None


def state_beside(checkpoint: Path) -> OptimizerState | None:
    """The optimizer state in the folder of the weights itself; None when there is none.

    Raises:
        CheckpointError: as :func:`find_state`.
    """
    return _in_folder(checkpoint, cache(lambda: model_parameters(checkpoint)))


def _in_folder(place: Path, parameters: Callable[[], Named]) -> OptimizerState | None:
    if (place / FOLDER / INDEX).is_file():
        return read_store(place / FOLDER)
    if (place / INDEX).is_file() and place.name == FOLDER:
        return read_store(place)
    names = sorted(path.name for path in place.iterdir())
    if OPTIMIZER in names:
        return read_torch_files([place / OPTIMIZER], "trainer", parameters)
    files = [name for name in names if re.fullmatch(r"optimizer(_\d+)?\.bin", name)]
    if files:
        files.sort(key=lambda name: int((re.search(r"\d+", name) or ["0"])[0]))
        return read_torch_files([place / name for name in files], "accelerate", parameters)
    unreadable = [n for n in names if _DEEPSPEED.fullmatch(n) or _PER_RANK.fullmatch(n)]
    if unreadable:
        raise CheckpointError(
            f"{str(place)!r} holds optimizer state in pieces of single processes "
            f"({unreadable[0]!r}), which growkit does not put together.",
            f"Save it as a torch.distributed.checkpoint or a full state dict. {RESET}",
        )
    # Several optimizers have several folders; what other folders hold is not looked at.
    folders = [place / name for name in names if _SHARDED.fullmatch(name)]
    sharded = [path for path in (place, *folders) if _is_file(path, METADATA)]
    states = [state for path in sharded if (state := read_sharded(path)) is not None]
    if not states:
        return None
    merged = {name: s for state in states for name, s in state.parameters.items()}
    groups = tuple(group for state in states for group in state.groups)
    return OptimizerState("dcp", states[0].path, merged, groups)


def _is_file(folder: Path, name: str) -> bool:
    return folder.is_dir() and (folder / name).is_file()


def last_of_run(place: Path) -> Path | None:
    """The last checkpoint of a finished growkit run, whose weights are those of the folder."""
    try:
        record = read_training_record(place) or {}
    except CheckpointError:
        return None
    step, stages = record.get("steps"), record.get("stages") or 0
    if step is None:
        return None
    run = place / "training" / "stages" / str(stages - 1) if stages else place
    last = run / "training" / "checkpoints" / f"checkpoint-{step}"
    return last if last.is_dir() else None
