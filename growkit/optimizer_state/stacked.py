"""Parameters that are stored as several tensors: what a class of transformers joins on loading.

Experts, above all: transformers 5 keeps those of a layer in two parameters and stores a tensor for
every matrix of each (``experts.0.w1`` ...), under names of its own. :func:`stored_layout` asks
transformers' own conversion where every stored tensor lies inside its parameter, so that a process
can read and write its part of the parameter alone, and moments follow their weights
(:func:`joined`, :func:`split`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from growkit.checkpoint import Checkpoint
from growkit.core.errors import CheckpointError
from growkit.optimizer_state.source import Array, Moment, OptimizerState, ParameterState

Shape = tuple[int, ...]
_KEPT = "_growkit_stored_layout"  # on the model: it does not change


@dataclass(frozen=True)
class Part:
    """A stored tensor: entries of a parameter, from number ``first`` of the flat one on."""

    name: str
    shape: Shape
    first: int

    @property
    def end(self) -> int:
        """Behind its last entry."""
        return self.first + prod(self.shape)


@dataclass(frozen=True)
class Stored:
    """A parameter of ``shape`` and the tensors that it is stored as, which fill it in order."""

    shape: Shape
    parts: tuple[Part, ...]


Layout = Mapping[str, Stored]


def plain_layout(shapes: Mapping[str, Shape]) -> Layout:
    """Every parameter is one tensor of its name."""
    return {name: Stored(shape, (Part(name, shape, 0),)) for name, shape in shapes.items()}


def stored_layout(model: Any, shapes: Mapping[str, Shape]) -> Layout | None:
    """How ``save_pretrained`` would store the tensors of a transformers model, sharded or not.

    None where it does more than to cut them along their first dimensions (transposes, say).

    Args:
        shapes: of the model's tensors by name, whole ones.
    """
    found = model.__dict__.get(_KEPT)
    if found is None or found[0] != shapes:
        found = (dict(shapes), _asked(_unsharded(model), shapes))
        model.__dict__[_KEPT] = found
    layout: Layout | None = found[1]
    return layout


def _unsharded(model: Any) -> Any:
    """The model, or one without memory of the class that FSDP2 took its place of."""
    import torch
    from torch.distributed.fsdp import FSDPModule

    kinds: list[Any] = [kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule)]
    if kinds[0] is type(model):
        return model
    with torch.device("meta"):
        return kinds[0](model.config)


def _asked(model: Any, shapes: Mapping[str, Shape]) -> Layout | None:
    """Rows are stood in for by their numbers, so that what comes out says where it was.

    A layer at a time: what is cut or joined is of one layer.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    layers: dict[str, list[str]] = {}
    for name in shapes:
        layers.setdefault(next((p for p in name.split(".") if p.isdigit()), ""), []).append(name)
    parts: dict[str, list[Part]] = {name: [] for name in shapes}
    for names in layers.values():
        rows = [prod(shapes[name][:-1]) for name in names]
        starts = np.cumsum([0, *rows])
        numbers = {
            name: torch.arange(start, start + count).reshape(*shapes[name][:-1], 1)
            for name, start, count in zip(names, starts.tolist(), rows, strict=False)
        }
        try:
            stored = revert_weight_conversion(model, numbers)
        except Exception:  # an operation that is not of rows
            return None
        for target, value in stored.items():
            if not value.numel() or value.shape[-1:] != (1,):
                return None
            flat = value.flatten()
            first = int(flat[0])
            if not torch.equal(flat, torch.arange(first, first + len(flat))):
                return None
            place = bisect_right(starts, first) - 1
            name = names[place]
            width = shapes[name][-1] if shapes[name] else 1
            shape = (*value.shape[:-1], width) if shapes[name] else ()
            parts[name].append(Part(target, shape, (first - int(starts[place])) * width))
    layout = {}
    for name, found in parts.items():
        found.sort(key=lambda part: part.first)
        ends = [0, *(part.end for part in found)]
        if [part.first for part in found] != ends[:-1] or ends[-1] != prod(shapes[name]):
            return None
        layout[name] = Stored(shapes[name], tuple(found))
    return layout


def layout_of_folder(model: Any, shapes: Mapping[str, Shape], stored: Iterable[str]) -> Layout:
    """How a folder with tensors of these names holds the model: joined already, or in parts.

    Raises:
        CheckpointError: transformers does something to them that cannot be done by parts.
    """
    names = set(stored)
    if shapes.keys() <= names:
        return plain_layout(shapes)
    layout = stored_layout(model, shapes)
    if layout is None:
        raise CheckpointError(
            f"The tensors of a {model.config.model_type} are stored in a way that cannot be read "
            "part by part.",
            "Set parallel.strategy: ddp.",
        )
    return layout


def joined(state: OptimizerState, layout: Layout) -> OptimizerState:
    """State of stored tensors as that of the parameters; parts without state have zeros.

    As new units in a tensor do: their step counter is that of the others.
    """
    parameters = dict(state.parameters)
    for name, stored in layout.items():
        found = {part: state.parameters.get(part.name) for part in stored.parts}
        known = {part: one for part, one in found.items() if one is not None}
        if not known or (len(stored.parts) == 1 and stored.parts[0].name == name):
            continue
        for part in known:
            parameters.pop(part.name, None)
        one = next(iter(known.values()))
        moments = {
            kind: Moment(stored.shape, moment.dtype, partial(_join, stored, known, kind))
            for kind, moment in one.moments.items()
        }
        steps = [p.step for p in known.values() if p.step is not None]
        parameters[name] = ParameterState(moments, max(steps, default=None))
    return replace(state, parameters=parameters)


def _join(stored: Stored, known: Mapping[Part, ParameterState], kind: str) -> Array:
    values: Array | None = None
    for part, state in known.items():
        if kind in state.moments:
            piece = np.asarray(state.moments[kind].read())
            if values is None:
                values = np.zeros(prod(stored.shape), piece.dtype)
            values[part.first : part.end] = piece.reshape(-1)
    assert values is not None
    return values.reshape(stored.shape)


def split(state: OptimizerState, checkpoint: Checkpoint) -> OptimizerState:
    """State of a model's parameters as that of the tensors in its folder, which are grown.

    As it is where the names are the folder's own, or transformers cannot tell.
    """
    if state.parameters.keys() <= checkpoint.tensors.keys():
        return state
    layout = _layout_by_config(checkpoint.path)

    @lru_cache(maxsize=2)  # a stack is read once for all of its experts, and two are held
    def read(name: str, kind: str) -> Array:
        return state.parameters[name].moments[kind].read()

    parameters: dict[str, ParameterState] = {}
    for name, found in state.parameters.items():
        stored = layout.get(name)
        if stored is None or any(m.shape != stored.shape for m in found.moments.values()):
            parameters[name] = found  # of another model: refused by name
            continue
        for part in stored.parts:
            moments = {
                kind: Moment(
                    part.shape, moment.dtype, partial(_cut, partial(read, name, kind), part)
                )
                for kind, moment in found.moments.items()
            }
            parameters[part.name] = ParameterState(moments, found.step)
    return replace(state, parameters=parameters)


def _cut(read: Any, part: Part) -> Array:
    whole: Array = read().reshape(-1)
    return whole[part.first : part.end].reshape(part.shape)


def _layout_by_config(folder: Path) -> Layout:
    from growkit.optimizer_state.parameter_names import empty_model

    try:
        model = empty_model(folder)
    except CheckpointError:
        return {}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return stored_layout(model, shapes) or {}
