"""The mean of the last checkpoints' weights (SWA, 1803.05407; LAWA, 2209.14981)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from growkit.checkpoint import open_checkpoint
from growkit.errors import CheckpointError
from growkit.training.checkpoints import damage, list_checkpoints


def last_whole(folder: Path, count: int) -> list[Path]:
    """The newest ``count`` undamaged checkpoints of a run.

    Raises:
        CheckpointError: there are fewer.
    """
    whole = [path for path in list_checkpoints(folder) if damage(path) is None]
    if len(whole) < count:
        raise CheckpointError(
            f"{len(whole)} whole checkpoints are in {str(folder)!r}, and "
            f"training.average_checkpoints is {count}.",
            "Begin anew with --overwrite, or set it to 1 (the last weights as they are).",
        )
    return whole[-count:]


@torch.no_grad()
def average_into(model: Any, folders: Sequence[Path]) -> None:
    """Set a model's parameters to the mean of those in checkpoint folders.

    Sums are in float64 and the mean is rounded once, to the parameter's dtype (float32 unless the
    recipe trains bfloat16 weights), so values that all checkpoints share come out as they are. One
    tensor is in memory at a time; where parameters have other names on the disk (stacked experts),
    one more model for each checkpoint.
    """
    with ExitStack() as stack:
        sources = [_reader(model, folder, stack) for folder in folders]
        for name, parameter in model.named_parameters():
            total = torch.zeros(tuple(parameter.shape), dtype=torch.float64)
            for read in sources:
                total += read(name).double()
            parameter.copy_((total / len(sources)).to(parameter.dtype))


def _reader(model: Any, folder: Path, stack: ExitStack) -> Callable[[str], torch.Tensor]:
    """From a parameter's name to its values in a checkpoint."""
    checkpoint = stack.enter_context(open_checkpoint(folder))
    names = {name for name, _ in model.named_parameters()}
    if names <= checkpoint.tensors.keys():
        # numpy has no bfloat16 that torch knows; float64 holds everything.
        return lambda name: torch.from_numpy(checkpoint.read(name).astype("float64"))
    loaded = dict(type(model).from_pretrained(folder, dtype="auto").named_parameters())
    return lambda name: loaded[name].detach()
