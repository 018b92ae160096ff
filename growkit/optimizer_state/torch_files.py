"""State dicts that torch.save wrote: Trainer's optimizer.pt, accelerate's optimizer.bin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from growkit.checkpoint import DTYPES
from growkit.core.errors import CheckpointError
from growkit.core.files import require_regular
from growkit.optimizer_state.parameter_names import Named, names_of_positions, plain_name
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

_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
}


def dtype_name(dtype: Any, what: str) -> str:
    """safetensors name of a torch dtype that moments may have."""
    name = _NAMES.get(str(dtype))
    if name is None:
        raise CheckpointError(
            f"{what} has dtype {dtype}, and moments are grown in {', '.join(_NAMES.values())}.",
            RESET,
        )
    return name


def as_array(tensor: Any) -> Array:
    """The values of a CPU tensor; bfloat16 through its bits, which numpy itself cannot hold."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        kind = DTYPES["BF16"].numpy
        assert kind is not None
        bits: Array = tensor.contiguous().view(torch.uint16).numpy().view(kind)
        return bits
    array: Array = tensor.numpy()
    return array


def as_tensor(array: Array) -> Any:
    """The other way, without a copy."""
    import torch

    if str(array.dtype) == "bfloat16":
        return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def read_torch_files(
    files: Sequence[Path], layout: str, parameters: Callable[[], Named]
) -> OptimizerState:
    """The joint state of the optimizers in ``files``; tensors stay mapped from disk.

    Args:
        parameters: the model's parameters in their order, asked when names are not stored.

    Raises:
        CheckpointError: a file is damaged, of an unknown kind, or cannot be assigned to names.
    """
    dicts = [_load(path) for path in files]
    if any(isinstance(key, str) for content in dicts for key in content["state"]):
        named = [
            (plain_name(str(key)), entries)
            for content in dicts
            for key, entries in content["state"].items()
        ]
    else:
        named = _named(dicts, files[0].name, parameters)
    states = {}
    for name, entries in named:
        if entries:
            states[name] = _parameter_state(name, entries, files[0].name)
    groups = [plain_options(group) for content in dicts for group in content["param_groups"]]
    return OptimizerState(layout, files[0], states, tuple(groups))


def _named(
    dicts: list[Mapping[str, Any]], file: str, parameters: Callable[[], Named]
) -> list[tuple[str, Mapping[str, Any]]]:
    """State with names, positions of several optimizers counted on."""
    groups: list[dict[str, Any]] = []
    state: dict[int, Mapping[str, Any]] = {}
    start = 0
    for content in dicts:
        own = [dict(group) for group in content["param_groups"]]
        for group in own:
            group["params"] = [start + position for position in group["params"]]
        groups += own
        state |= {start + position: entries for position, entries in content["state"].items()}
        start += sum(len(group["params"]) for group in own)
    shapes = {
        position: shape
        for position, entries in state.items()
        if (shape := _shape_of(entries)) is not None
    }
    names = names_of_positions(groups, shapes, parameters, file)
    return [(names[position], entries) for position, entries in state.items()]


def _shape_of(entries: Mapping[str, Any]) -> tuple[int, ...] | None:
    for kind, value in entries.items():
        if kind != COUNTER and hasattr(value, "shape"):
            return tuple(value.shape)
    return None


def _load(path: Path) -> Mapping[str, Any]:
    import torch

    require_regular(path, remedy=RESET)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # truncated, not a zip, an old format, foreign classes
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{str(path)!r} cannot be read: {first}", RESET) from error
    while isinstance(content, Mapping) and "state" not in content and "optimizer" in content:
        content = content["optimizer"]
    if not (isinstance(content, Mapping) and {"state", "param_groups"} <= set(content)):
        raise CheckpointError(f"{str(path)!r} is not the state of a torch optimizer.", RESET)
    return content


def _parameter_state(name: str, entries: Mapping[str, Any], file: str) -> ParameterState:
    kept = {kind: value for kind, value in entries.items() if value is not None}
    check_kinds(kept, name, file)
    moments = {
        kind: Moment(
            tuple(value.shape),
            dtype_name(value.dtype, f"{kind} of {name!r}"),
            partial(as_array, value),
        )
        for kind, value in kept.items()
        if kind != COUNTER
    }
    return ParameterState(moments, counter(kept.get(COUNTER)))
