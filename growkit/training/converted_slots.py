"""The new-parameter map of models whose parameters are not named and cut as on the disk.

transformers stacks the experts of a layer into one tensor when it loads them, among other
conversions. So the map is written as a checkpoint (1 where an entry is new, 0 where it is old) and
loaded as one: whatever happens to the weights happens to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growkit.checkpoint import open_checkpoint
from growkit.errors import UsageError
from growkit.training.slots import EntrySlots, SlotMap, Slots, map_slots


def converted_slots(new_parameters: Mapping[str, Any], source: Path, model: Any) -> SlotMap:
    """The map by the model's own names. Needs memory for two copies of the model in bfloat16.

    Raises:
        UsageError: the map is of another checkpoint.
    """
    with open_checkpoint(source) as checkpoint:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    stored = map_slots(new_parameters, shapes, str(source / "growkit.json"))
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
    slots: dict[str, Slots | EntrySlots | None] = {}
    for name, values in loaded.named_parameters():
        entries = values.detach() != 0
        if bool(entries.all()):
            slots[name] = None
        elif bool(entries.any()):
            slots[name] = EntrySlots(entries)
    return SlotMap(slots)


def _mask(stored: SlotMap, name: str, shape: tuple[int, ...]) -> Tensor:
    part = stored.part(name)
    if part == "mixed":
        return stored.slots(name).mask().to(torch.bfloat16)
    return torch.full(shape, float(part == "new"), dtype=torch.bfloat16)
