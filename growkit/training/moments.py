"""Optimizer state of a file, compared with the parameters before anything of it is loaded.

torch takes what it is given: a moment of another shape makes fused kernels write beyond their
memory, a missing one or a text in place of a rate ends in the middle of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from growkit.core.errors import CheckpointError

COUNTER = "step"
# What each kind of optimizer keeps of a parameter, beside the step counter.
_KEPT = {"adamw": {"exp_avg", "exp_avg_sq"}, "muon": {"momentum_buffer"}}
REMEDY = "Remove that checkpoint's folder: the same command continues from the one before."
State = Mapping[str, Any]


def check_optimizer_state(optimizer: Any, content: Any, file: Path) -> None:
    """Compare a state dict with an optimizer whose groups hold ``param_names`` and ``kind``.

    Raises:
        CheckpointError: naming the file and what in it is not of this optimizer.
    """
    groups, state = content["param_groups"], content["state"]
    if not isinstance(state, Mapping) or not isinstance(groups, list | tuple):
        raise CheckpointError(f"{str(file)!r} is not the state of an optimizer.", REMEDY)
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{str(file)!r} has {len(groups)} groups of parameters instead of "
            f"{len(optimizer.param_groups)}.",
            REMEDY,
        )
    known = set()
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        check_options(group, own, file)
        positions = group.get("params")
        if not isinstance(positions, list) or len(positions) != len(own["params"]):
            raise CheckpointError(f"{str(file)!r} is the state of other parameters.", REMEDY)
        for position, name, parameter in zip(
            positions, own["param_names"], own["params"], strict=True
        ):
            if not isinstance(position, int):
                raise CheckpointError(f"{str(file)!r} is the state of other parameters.", REMEDY)
            known.add(position)
            if position in state:
                check_entries(state[position], name, parameter, own["kind"], file)
    if not state.keys() <= known:
        raise CheckpointError(f"{str(file)!r} is the state of other parameters.", REMEDY)


def check_options(group: Any, own: Mapping[str, Any], file: Path) -> None:
    """The options of a group are of the kinds that the optimizer's own are, and of its names."""
    if not isinstance(group, Mapping):
        raise CheckpointError(f"{str(file)!r} has a damaged group of parameters.", REMEDY)
    names = group.get("param_names")
    if names is not None and list(names) != list(own["param_names"]):
        raise CheckpointError(f"{str(file)!r} is the state of other parameters.", REMEDY)
    for key, value in own.items():
        if key in group and key not in ("params", "param_names") and not _alike(group[key], value):
            raise CheckpointError(
                f"{str(file)!r} has {str(group[key])[:40]!r} for the option {key}.", REMEDY
            )


def _alike(value: Any, own: Any) -> bool:
    if isinstance(own, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(own, bool)
    if isinstance(own, int | float):
        return isinstance(value, int | float)
    if isinstance(own, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(own)
            and all(map(_alike, value, own))
        )
    return isinstance(value, type(own))


def check_entries(
    entries: Any, name: str, parameter: Tensor, kind: str, file: Path, remedy: str = REMEDY
) -> None:
    """The state of one parameter: all of its moments, of its shape and dtype, and a counter.

    Args:
        entries: tensors, or anything with their ``shape`` and ``dtype``, by name.

    Raises:
        CheckpointError: naming the parameter and what is wrong.
    """
    kept = _KEPT.get(kind, set())
    if not isinstance(entries, Mapping) or not kept <= entries.keys():
        raise CheckpointError(f"{str(file)!r} lacks a moment of {name!r}.", remedy)
    for key, value in entries.items():
        if key == COUNTER:
            check_counter(value, name, file, remedy)
        elif value is not None and key in kept:
            check_moment(value, key, name, parameter, file, remedy)
        elif value is not None:
            raise CheckpointError(
                f"{str(file)!r} holds {str(key)[:40]!r} of {name!r}, which is no moment of {kind}.",
                remedy,
            )


def check_moment(
    value: Any, key: str, name: str, parameter: Tensor, file: Path, remedy: str = REMEDY
) -> None:
    """Shape and dtype of a moment are those of its parameter."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or tuple(shape) != tuple(parameter.shape) or dtype != parameter.dtype:
        found = "no tensor" if shape is None else f"{list(shape)} of {dtype}"
        raise CheckpointError(
            f"{str(file)!r} has {found} for {key} of {name!r}, and the parameter is "
            f"{list(parameter.shape)} of {parameter.dtype}.",
            remedy,
        )


def check_counter(value: Any, name: str, file: Path, remedy: str = REMEDY) -> None:
    """A step counter is one number, from 0 on."""
    single = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    number = float(value) if single or type(value) in (int, float) else -1.0
    if not 0 <= number < float("inf"):
        raise CheckpointError(f"{str(file)!r} has no step counter of {name!r}.", remedy)
