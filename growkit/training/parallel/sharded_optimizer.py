"""The optimizer state of a sharded model, by torch's distributed checkpoint (DCP).

Layout: that of accelerate (``optimizer_0/`` with ``optimizer.state.NAME.exp_avg`` ...), so that
what reads one reads the other. Every process writes its part; any number of processes reads it, as
each takes the parts of each file that it needs.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from growkit.core.errors import CheckpointError
from growkit.optimizer_state.dcp_index import Planner, Reader, load
from growkit.training.moments import COUNTER, check_entries, check_moment, check_options
from growkit.training.parallel.processes import Processes

FOLDER = "optimizer_0"
_STATE = "optimizer.state."


def _names(optimizer: Any) -> dict[str, Tensor]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """The param groups with names in place of parameters."""
    return [{**group, "params": list(group["param_names"])} for group in optimizer.param_groups]


def _kinds(optimizer: Any) -> dict[str, str]:
    return {
        name: group["kind"] for group in optimizer.param_groups for name in group["param_names"]
    }


def save_optimizer(optimizer: Any, checkpoint: Path, processes: Processes) -> None:
    """Write the state of every parameter that has one; all processes together."""
    state = {
        name: dict(optimizer.state[parameter])
        for name, parameter in _names(optimizer).items()
        if parameter in optimizer.state
    }
    dcp.save(
        {"optimizer": {"state": state, "param_groups": _groups(optimizer)}},
        checkpoint_id=checkpoint / FOLDER,
        process_group=processes.group,
    )


def load_optimizer(optimizer: Any, checkpoint: Path, processes: Processes) -> None:
    """Read the state into an optimizer of the same parameters, in any number of processes.

    Raises:
        CheckpointError: it is the state of other parameters, or its index cannot be trusted.
    """
    parameters = _names(optimizer)
    reader = Reader(checkpoint / FOLDER)  # torch's own would unpickle the index unrestricted
    stored = reader.metadata.state_dict_metadata
    state: dict[str, dict[str, Any]] = {}
    for key, entry in stored.items():
        if not key.startswith(_STATE) or not isinstance(entry, TensorStorageMetadata):
            continue
        name, slot = key.removeprefix(_STATE).rsplit(".", 1)
        if name not in parameters:
            raise CheckpointError(
                f"{checkpoint.name} has optimizer state of {name!r}, which is not trained.",
                "Begin anew with --overwrite, or continue with the recipe that wrote it.",
            )
        parameter, dtype = parameters[name].detach(), entry.properties.dtype
        if slot == COUNTER and entry.size.numel() == 1:
            value = torch.zeros(entry.size, dtype=dtype, device=parameter.device)
        else:  # judged by what the file says, before memory of its size is asked for
            found = SimpleNamespace(shape=entry.size, dtype=dtype)
            check_moment(found, slot, name, parameter, checkpoint)
            value = torch.zeros_like(parameter)
        state.setdefault(name, {})[slot] = value
    kinds = _kinds(optimizer)
    for name, values in state.items():
        check_entries(values, name, parameters[name], kinds[name], checkpoint)
    groups = _groups(optimizer)
    target: dict[str, Any] = {"optimizer": {"state": state, "param_groups": groups}}
    load(target, reader, Planner(), process_group=processes.group)
    for name, values in state.items():
        check_entries(values, name, parameters[name], kinds[name], checkpoint)
    optimizer.state.clear()
    for name, values in state.items():
        optimizer.state[parameters[name]] = values
    for group, loaded in zip(
        optimizer.param_groups, target["optimizer"]["param_groups"], strict=True
    ):
        check_options(loaded, group, checkpoint)
        group |= {key: value for key, value in loaded.items() if key != "params"}
