"""Weights of a sharded model to and from safetensors: every process moves its own rows, no other.

FSDP2 shards each parameter by its first dimension, so a process's part is one range of bytes of the
tensor on disk, or of several that are stored one by one (experts, which transformers stacks). It is
read and written in place: no process ever holds the model, nothing is gathered, and the result is
an ordinary folder of as many files as its size asks for. Tensor parallelism also cuts columns: of
such a parameter the rows are read whole, and it is gathered to be written, one at a time.
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
from growkit.training.growth.slots import is_sharded, local, local_offsets
from growkit.training.parallel.processes import Processes

MAX_SHARD_SIZE = 5 * 10**9
# Converted between disk and memory in pieces of at most so many elements.
PIECE = 4 << 20
_STORED = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def local_part(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(the entries of a parameter that this process holds, where they begin in each dimension).

    A parameter that is not sharded is one's own as a whole. The entries share its memory.
    """
    return local(parameter.detach()), local_offsets(parameter)


def read_part(
    checkpoint: Checkpoint, stored: Stored, offsets: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """Consecutive entries of a part of a parameter, as (position in the part, flat values).

    Args:
        offsets: where the part begins in each dimension.
        shape: of the part.
    """
    first, rows = (offsets or (0,))[0], (shape or (1,))[0]
    pieces = _read_rows(checkpoint, stored, first, (rows, *stored.shape[1:]))
    if shape[1:] == stored.shape[1:]:
        yield from pieces
        return
    found = [piece for _, piece in pieces]
    whole = (np.concatenate(found) if found else np.empty(0)).reshape(rows, *stored.shape[1:])
    for dimension, (offset, length) in enumerate(zip(offsets[1:], shape[1:], strict=True), 1):
        whole = whole.take(range(offset, offset + length), dimension)
    yield 0, whole.reshape(-1)


def gathered(parameter: Any) -> Tensor:
    """The whole parameter, in every process; all of them have to ask."""
    whole: Tensor = parameter.detach().full_tensor()
    return whole


def _read_rows(
    checkpoint: Checkpoint, stored: Stored, first: int, shape: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """The same of whole rows ``first`` on."""
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
            held, offsets = local_part(tensor)
            flat = held.view(-1)
            for position, piece in read_part(checkpoint, layout[name], offsets, tuple(held.shape)):
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
            held, offsets = local_part(tensor)
            if held.shape[1:] != tensor.shape[1:]:  # not rows: the first one writes it
                tensor = gathered(tensor)
                held, offsets = tensor, (0,) * tensor.ndim
            if not is_sharded(tensor) and not processes.first:
                continue
            flat, size = held.reshape(-1), tensor.element_size()
            start = (offsets or (0,))[0] * math.prod(tensor.shape[1:])
            for part in layout[name].parts:
                last = min(part.end, start + flat.numel())
                for position in range(max(part.first, start), last, PIECE):
                    end = min(position + PIECE, last)
                    piece = flat[position - start : end - start].cpu().contiguous()
                    offset = (position - part.first) * size
                    writer.write(part.name, offset, piece.view(torch.uint8).numpy())
    processes.barrier()
