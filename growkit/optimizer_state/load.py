"""Give stored state to the optimizer of a run, by parameter name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from growkit.core.errors import CheckpointError
from growkit.optimizer_state.parameter_names import plain_name
from growkit.optimizer_state.source import COUNTER, RESET, OptimizerState, ParameterState
from growkit.optimizer_state.stacked import joined, stored_layout
from growkit.optimizer_state.torch_files import as_tensor

_FLOATING = {"F64", "F32", "BF16", "F16"}
# Moments that an optimizer needs together; a state without them would be taken for a whole one.
_NEEDED = {"adamw": {"exp_avg", "exp_avg_sq"}, "muon": {"momentum_buffer"}}


@dataclass(frozen=True)
class Loaded:
    """What became of the parameters of an optimizer.

    Attributes:
        loaded: names that continue with their state.
        fresh: names that begin anew, because there is no state of them or one of another kind.
        unused: names of the stored state that the optimizer does not have.
    """

    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def load_into(optimizer: Any, model: Any, state: OptimizerState) -> Loaded:
    """Replace the state of a torch optimizer, before its first step.

    Args:
        optimizer: any torch optimizer over parameters of ``model`` (also accelerate's wrapper);
            its groups stay as they are. Sharded parameters (DTensor) get their own part.
        model: gives names where the groups do not hold ``param_names``; wrappers may be around it.
        state: moments and step counters by name.

    Raises:
        CheckpointError: a moment has another shape than its parameter or is not of floating point,
            or a step counter is none.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    content = optimizer.state_dict()
    loaded, fresh = [], []
    known = list(_parameters(optimizer, model))
    state = _by_parameters(state, model, {name for _, name, *_ in known})
    for position, name, parameter, group in known:
        found = state.parameters.get(name)
        if found is None or not _fits(group, optimizer, found):
            fresh.append(name)
            continue
        content["state"][position] = _tensors(name, parameter, found)
        loaded.append(name)
    optimizer.load_state_dict(content)
    unused = sorted(set(state.parameters) - set(loaded) - set(fresh))
    return Loaded(tuple(loaded), tuple(fresh), tuple(unused))


def _by_parameters(state: OptimizerState, model: Any, names: set[str]) -> OptimizerState:
    """State of tensors as they are stored (one an expert) under the parameters' own names."""
    if state.parameters.keys() <= names:
        return state
    for wrapper in ("module", "_orig_mod"):  # DDP, torch.compile
        model = getattr(model, wrapper, model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    layout = stored_layout(model, shapes) if hasattr(model, "config") else None
    return state if layout is None else joined(state, layout)


def _parameters(optimizer: Any, model: Any) -> Iterator[tuple[int, str, Any, Mapping[str, Any]]]:
    """(position in the state dict, name, parameter, group)."""
    names = {id(p): plain_name(name) for name, p in model.named_parameters()}
    position = 0
    for group in optimizer.param_groups:
        stored = group.get("param_names") or [None] * len(group["params"])
        for name, parameter in zip(stored, group["params"], strict=True):
            known = plain_name(name) if name is not None else names.get(id(parameter), "")
            yield position, known, parameter, group
            position += 1


def _fits(group: Mapping[str, Any], optimizer: Any, found: ParameterState) -> bool:
    kind = str(group.get("kind") or type(optimizer).__name__).lower()
    needed = _NEEDED.get("adamw" if kind == "adam" else kind)
    return needed is None or needed <= set(found.moments)


def _tensors(name: str, parameter: Any, found: ParameterState) -> dict[str, Any]:
    import torch

    result: dict[str, Any] = {}
    if found.step is not None:
        if not 0 <= found.step < math.inf:
            raise CheckpointError(f"The step of {name!r} is {found.step}.", RESET)
        result[COUNTER] = torch.tensor(found.step, dtype=torch.float32)
    for kind, moment in found.moments.items():
        if tuple(moment.shape) != tuple(parameter.shape):
            raise CheckpointError(
                f"{kind} of {name!r} has shape {list(moment.shape)}, and the parameter "
                f"{list(parameter.shape)}.",
                f"The state is of another model. {RESET}",
            )
        if moment.dtype not in _FLOATING:
            raise CheckpointError(f"{kind} of {name!r} has dtype {moment.dtype}.", RESET)
        value = as_tensor(moment.read())
        if hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            # Every process reads the whole moment and keeps its part: nothing is sent.
            value = distribute_tensor(
                value.to(parameter.device),
                parameter.device_mesh,
                parameter.placements,
                src_data_rank=None,
            )
        result[kind] = value
    return result
