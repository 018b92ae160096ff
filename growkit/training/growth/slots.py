"""Which entries of a model's parameters are new, as the optimizer needs it.

A parameter is wholly old, wholly new, or *mixed*: some rows or columns are new, and an entry is new
when its row or its column is. Two boolean vectors describe that; a mask lives as long as one
parameter's step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError, nearest
from growkit.core.names import MANIFEST
from growkit.optimizer_state.stacked import Layout, stored_layout

Part = Literal["old", "new", "mixed"]


@dataclass(frozen=True)
class Slots:
    """New rows and columns of a mixed parameter.

    Attributes:
        rows: bool ``[shape[0]]``.
        columns: bool ``[shape[1]]``, or None for a vector.
    """

    rows: Tensor
    columns: Tensor | None

    def local_to(self, parameter: Tensor) -> Slots:
        """The part that a process needs for its shard of ``parameter``, on its device."""
        offsets, shape = local_offsets(parameter), local(parameter).shape
        rows, columns = self.rows.narrow(0, offsets[0], shape[0]), self.columns
        if columns is not None:
            columns = columns.narrow(0, offsets[1], shape[1])
        device = parameter.device
        return Slots(rows.to(device), None if columns is None else columns.to(device))

    def mask(self) -> Tensor:
        """The new entries, bool ``[rows, columns]`` or ``[rows]``."""
        if self.columns is None:
            return self.rows
        return self.rows[:, None] | self.columns[None, :]


@dataclass(frozen=True)
class EntrySlots:
    """New entries of a parameter in which they are no whole rows and columns (stacked experts).

    Attributes:
        entries: bool of the parameter's shape.
    """

    entries: Tensor

    def local_to(self, parameter: Any) -> EntrySlots:
        """See :meth:`Slots.local_to`."""
        entries = self.entries
        offsets, shape = local_offsets(parameter), local(parameter).shape
        for dimension, (first, length) in enumerate(zip(offsets, shape, strict=True)):
            entries = entries.narrow(dimension, first, length)
        return EntrySlots(entries.to(parameter.device))

    def mask(self) -> Tensor:
        """The new entries."""
        return self.entries


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """The entries that this process holds; shares memory with ``tensor``."""
    held: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return held


def local_offsets(parameter: Any) -> tuple[int, ...]:
    """Where the entries that this process holds of a parameter begin, along each dimension."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(parameter, DTensor):
        return (0,) * parameter.ndim
    _, offsets = compute_local_shape_and_global_offset(
        torch.Size(parameter.shape), parameter.device_mesh, parameter.placements
    )
    return tuple(offsets)


class SlotMap:
    """What of every parameter is new.

    Args:
        slots: name -> new rows and columns or entries, None for a wholly new parameter. Parameters
            without new parts are absent.
    """

    def __init__(self, slots: Mapping[str, Slots | EntrySlots | None]) -> None:
        self._slots = dict(slots)

    def __bool__(self) -> bool:
        return bool(self._slots)

    def part(self, name: str) -> Part:
        """What of a parameter is new."""
        if name not in self._slots:
            return "old"
        return "new" if self._slots[name] is None else "mixed"

    def slots(self, name: str) -> Slots | EntrySlots:
        """The new part of a mixed parameter."""
        found = self._slots[name]
        assert found is not None, f"{name} is not mixed"
        return found


def map_slots(
    new_parameters: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    source: str = MANIFEST,
) -> SlotMap:
    """The new-parameter map of a model whose parameters have the names that are on the disk.

    Args:
        new_parameters: see :func:`growkit.record.new_parameters.new_parameters`.
        shapes: of the model's parameters.
        source: named in errors.

    Raises:
        UsageError: the map names a parameter that the model does not have, or of another size.
    """
    slots: dict[str, Slots | EntrySlots | None] = {}
    for name, part in new_parameters.items():
        if name not in shapes:
            raise UsageError(
                f"{source} lists {name!r} as new, and the model has no such parameter.",
                f"{nearest(name, shapes)}Train everything with train: all and no multipliers, "
                "or grow the checkpoint again with this version of growkit.",
            )
        slots[name] = None if part == "all" else _slots(name, part, shapes[name], source)
    return SlotMap(slots)


def _slots(
    name: str, part: Mapping[str, Any], shape: tuple[int, ...], source: str
) -> Slots | EntrySlots:
    vectors: list[Tensor] = []
    labels = ("experts", "rows", "columns")[0 if len(shape) == 3 else 1 :]
    for dimension, label in enumerate(labels[: len(shape)]):
        vector = torch.zeros(shape[dimension], dtype=torch.bool)
        for start, end in part.get(label, ()):
            if not 0 <= start < end <= shape[dimension]:
                raise UsageError(
                    f"{source} lists {label} {start} to {end} of {name!r} as new, and it has "
                    f"{shape[dimension]}.",
                    "growkit.json and the weights are of different models: use the folder that "
                    "growkit grow wrote, or a run that continued it.",
                )
            vector[start:end] = True
        vectors.append(vector)
    if len(vectors) == 3:
        experts, rows, columns = vectors
        return EntrySlots(experts[:, None, None] | rows[:, None] | columns)
    return Slots(vectors[0], vectors[1] if len(vectors) > 1 else None)


def converted_slots(new_parameters: Mapping[str, Any], source: Path, model: Any) -> SlotMap:
    """The map by the model's own names; entry by entry where parameters are stored in parts.

    Where they are no rows of what is stored, transformers converts a model of zeros and ones, which
    needs memory for two copies of the model in bfloat16.

    Raises:
        UsageError: the map is of another checkpoint.
    """
    with open_checkpoint(source) as checkpoint:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    stored = map_slots(new_parameters, shapes, str(source / MANIFEST))
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    layout = stored_layout(model, own)
    if layout is not None and {p.name for s in layout.values() for p in s.parts} >= shapes.keys():
        return SlotMap(dict(_by_parts(stored, layout)))
    state = {name: _mask(stored, name, shape) for name, shape in shapes.items()}
    loaded, info = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=state,
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise UsageError(
            f"The new-parameter map of {str(source)!r} does not fit the model.",
            "Train everything with train: all and no multipliers.",
        )
    found = ((name, values.detach() != 0) for name, values in loaded.named_parameters())
    return SlotMap({name: _new_of(entries) for name, entries in found if bool(entries.any())})


def _by_parts(stored: SlotMap, layout: Layout) -> Iterator[tuple[str, Slots | EntrySlots | None]]:
    for name, parameter in layout.items():
        if all(stored.part(part.name) == "old" for part in parameter.parts):
            continue
        entries = torch.zeros(parameter.shape, dtype=torch.bool)
        for part in parameter.parts:
            mask = _mask(stored, part.name, part.shape, torch.bool)
            entries.view(-1)[part.first : part.end] = mask.reshape(-1)
        yield name, _new_of(entries)


def _new_of(entries: Tensor) -> Slots | EntrySlots | None:
    """Of which some are new; None: all are."""
    return None if bool(entries.all()) else _vectors(entries) or EntrySlots(entries)


def _vectors(entries: Tensor) -> Slots | None:
    """New entries as whole rows and columns; None where they are not."""
    if entries.ndim == 1:
        return Slots(entries, None)
    if entries.ndim != 2:
        return None
    rows, columns = entries.all(dim=1), entries.all(dim=0)
    return Slots(rows, columns) if torch.equal(rows[:, None] | columns, entries) else None


def _mask(
    stored: SlotMap, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    part = stored.part(name)
    if part == "mixed":
        return stored.slots(name).mask().to(dtype)
    return torch.full(shape, part == "new", dtype=dtype)
