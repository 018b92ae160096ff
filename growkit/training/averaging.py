"""The mean of the last checkpoints' weights (SWA, arXiv:1803.05407; LAWA, arXiv:2209.14981)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from growkit.checkpoint import Checkpoint, open_checkpoint
from growkit.core.errors import CheckpointError
from growkit.optimizer_state.stacked import Layout, Stored, plain_layout, stored_layout
from growkit.training.checkpoints import damage, list_checkpoints
from growkit.training.parallel.sharded_files import (
    local_part,
    read_part,
    shapes_of,
    stored_tensors,
)


def last_whole(folder: Path, count: int) -> list[Path]:
    """The newest ``count`` undamaged checkpoints of a run.

    Raises:
        CheckpointError: there are fewer.
    """
    whole: list[Path] = []
    for path in reversed(list_checkpoints(folder)):
        if len(whole) < count and damage(path) is None:
            whole.insert(0, path)
    if len(whole) < count:
        raise CheckpointError(
            f"{len(whole)} whole checkpoints are in {str(folder)!r}, and "
            f"training.average_checkpoints is {count}.",
            "Begin anew with --overwrite, or set it to 1 (the last weights as they are).",
        )
    return whole


@torch.no_grad()
def average_into(model: Any, folders: Sequence[Path]) -> None:
    """Set a model's parameters to the mean of those in checkpoint folders.

    Sums are in float64 and the mean is rounded once, to the parameter's dtype (float32 unless the
    recipe trains bfloat16 weights), so values that all checkpoints share come out as they are. One
    tensor is in memory at a time, of a sharded one the rows that this process holds; where
    parameters are no rows of what is on the disk, one more model for each checkpoint.
    """
    with ExitStack() as stack:
        sources = [_reader(model, folder, stack) for folder in folders]
        for name, parameter in model.named_parameters():
            held, offsets = local_part(parameter)
            total = torch.zeros(tuple(held.shape), dtype=torch.float64)
            for read in sources:
                total += read(name, offsets, held)
            held.copy_((total / len(sources)).to(parameter.dtype))


def _reader(
    model: Any, folder: Path, stack: ExitStack
) -> Callable[[str, tuple[int, ...], torch.Tensor], torch.Tensor]:
    """From a parameter's name, where its part begins and its part to values in a checkpoint."""
    checkpoint = stack.enter_context(open_checkpoint(folder))
    shapes = shapes_of(stored_tensors(model))
    layout: Layout | None = plain_layout(shapes)
    if not shapes.keys() <= checkpoint.tensors.keys():
        layout = stored_layout(model, shapes)
    if layout is not None:
        return lambda name, offsets, part: _part(checkpoint, layout[name], offsets, part)
    loaded = dict(type(model).from_pretrained(folder, dtype="auto").named_parameters())
    return lambda name, offsets, part: loaded[name].detach().double()


def _part(
    checkpoint: Checkpoint, stored: Stored, offsets: tuple[int, ...], like: torch.Tensor
) -> torch.Tensor:
    """A part of a stored tensor in float64, which holds everything (torch has numpy's)."""
    values = torch.empty(like.numel(), dtype=torch.float64)
    for position, piece in read_part(checkpoint, stored, offsets, tuple(like.shape)):
        values[position : position + piece.size] = torch.from_numpy(piece.astype("float64"))
    return values.view(like.shape)
