"""Weights of a sharded model to and from safetensors: every process moves its own rows, no other.

FSDP2 shards each parameter by its first dimension, so a process's part is one range of bytes of the
tensor on disk, or of several that are stored one by one (experts, which transformers stacks). It is
read and written in place: no process ever holds the model, nothing is gathered, and the result is
an ordinary folder of as many files as its size asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from growkit.checkpoint import (
    DTYPES,
    Checkpoint,
    OutputTensor,
    ShardWriter,
    open_checkpoint,
    plan_shards,
)
from growkit.core.errors import CheckpointError
from growkit.optimizer_state.stacked import (
    Layout,
    Stored,
    layout_of_folder,
    plain_layout,
    stored_layout,
)
from growkit.training.growth.slots import is_sharded
from growkit.training.parallel.processes import Processes

MAX_SHARD_SIZE = 5 * 10**9
# Converted between disk and memory in pieces of at most so many elements.
PIECE = 4 << 20
_STORED = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def local_part(parameter: Tensor) -> tuple[Tensor, int]:
    """(the rows of a parameter that this process holds, the number of its first row).

    A parameter that is not sharded is one's own as a whole. The rows share the parameter's memory.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    parameter = parameter.detach()
    if not isinstance(parameter, DTensor):
        return parameter, 0
    (placement,) = parameter.placements
    assert placement.is_shard(0), placement
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local(), offset[0]


def read_rows(
    checkpoint: Checkpoint, stored: Stored, first: int, shape: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """Consecutive entries of rows ``first`` on of a parameter, as (position, flat values).

    Args:
        shape: of the wanted rows; position 0 is the first entry of row ``first``.
    """
    start = first * math.prod(shape[1:])
    end = start + math.prod(shape)
    for part in stored.parts:
        kind = DTYPES[checkpoint.info(part.name).dtype].numpy
        assert kind is not None, part.name
        size, last = np.dtype(kind).itemsize, min(part.end, end)
        for position in range(max(part.first, start), last, PIECE):
            piece = np.empty(min(PIECE, last - position), dtype=kind)
            checkpoint.read_into(part.name, piece, (position - part.first) * size)
            yield position - start, piece


@torch.no_grad()
def read_model(model: nn.Module, folder: Path) -> None:
    """Fill the parameters (and stored buffers) of a model from a folder, each process its rows.

    Raises:
        CheckpointError: the folder's tensors are not the model's, in name or shape.
    """
    with open_checkpoint(folder) as checkpoint:
        targets = stored_tensors(model)
        layout = layout_of_folder(model, shapes_of(targets), checkpoint.tensors)
        _check_same(layout, checkpoint)
        for name, tensor in targets.items():
            local, first = local_part(tensor)
            flat = local.view(-1)
            for position, piece in read_rows(checkpoint, layout[name], first, tuple(local.shape)):
                flat[position : position + piece.size].copy_(_to_torch(piece))


def _to_torch(values: np.ndarray[Any, Any]) -> Tensor:
    """The same bytes; numpy's bfloat16 is unknown to torch."""
    if values.dtype == DTYPES["BF16"].numpy:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a folder of the model holds: every tensor once, a tied one under its first name."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    tensors = {name: parameter for name, parameter in model.named_parameters() if name not in tied}
    persistent = model.state_dict(keep_vars=True).keys()
    return tensors | {n: b for n, b in model.named_buffers() if n in persistent and n not in tied}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Whole shapes, also of tensors of which a process holds a part."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_same(layout: Layout, checkpoint: Checkpoint) -> None:
    wanted = {part.name: part.shape for stored in layout.values() for part in stored.parts}
    problems = {
        "lacks": sorted(wanted.keys() - checkpoint.tensors.keys()),
        "has, unknown to the model,": sorted(checkpoint.tensors.keys() - wanted.keys()),
        "has in another shape": sorted(
            name
            for name, shape in wanted.items()
            if name in checkpoint.tensors and checkpoint.tensors[name].shape != shape
        ),
    }
    for problem, names in problems.items():
        if names:
            raise CheckpointError(
                f"{str(checkpoint.path)!r} {problem} {', '.join(names[:3])}"
                + (f" and {len(names) - 3} more." if names[3:] else "."),
                "A sharded model is read tensor by tensor; for a folder that transformers reads in "
                "another way, set parallel.strategy: ddp.",
            )


@torch.no_grad()
def write_model(model: nn.Module, folder: Path, processes: Processes) -> None:
    """Write the weights of a model into an existing folder, each process its rows.

    Args:
        folder: on a file system that all processes share, without weights.
    """
    tensors = stored_tensors(model)
    layout = stored_layout(model, shapes_of(tensors)) or plain_layout(shapes_of(tensors))
    outputs = [
        OutputTensor(part.name, _STORED[tensor.dtype], part.shape)
        for name, tensor in tensors.items()
        for part in layout[name].parts
    ]
    plan = plan_shards(outputs, MAX_SHARD_SIZE)
    processes.from_first(lambda: ShardWriter(folder, plan).close())
    with ShardWriter(folder, plan, create=False) as writer:
        for name, tensor in tensors.items():
            local, first = local_part(tensor)
            if not is_sharded(tensor) and not processes.first:
                continue
            flat, size = local.reshape(-1), tensor.element_size()
            start = first * math.prod(tensor.shape[1:])
            for part in layout[name].parts:
                last = min(part.end, start + flat.numel())
                for position in range(max(part.first, start), last, PIECE):
                    end = min(position + PIECE, last)
                    piece = flat[position - start : end - start].cpu().contiguous()
                    offset = (position - part.first) * size
                    writer.write(part.name, offset, piece.view(torch.uint8).numpy())
    processes.barrier()
