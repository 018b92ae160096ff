"""Which tensor goes into which file, and at which byte, decided before anything is written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from growkit.checkpoint.dtypes import DTYPES
from growkit.core.errors import UsageError

_UNITS = {"": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor that will be written: name, safetensors dtype name, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an output tensor goes: file name, absolute byte offset in it, length in bytes."""

    shard: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file: its name, its first bytes (length prefix and JSON), its final size in bytes."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The layout of a whole output folder.

    Attributes:
        shards: the files, in order.
        places: tensor name -> place, shard by shard in the order of the bytes.
        total_size: bytes of all tensors.
        total_parameters: elements of all tensors.
        index: content of ``model.safetensors.index.json``, or None for a single file.
    """

    shards: tuple[PlannedShard, ...]
    places: dict[str, Place]
    total_size: int
    total_parameters: int
    index: bytes | None

    @property
    def output_size(self) -> int:
        """Bytes of all files, headers and index included (holes counted as if they were full)."""
        return sum(shard.size for shard in self.shards) + len(self.index or b"")


def plan_shards(
    tensors: Sequence[OutputTensor], max_shard_size: int, stem: str = "model"
) -> ShardPlan:
    """Fill files with ``tensors`` in the given order; the result depends on nothing else.

    A file is closed when the next tensor would take its tensors above ``max_shard_size`` bytes; a
    larger tensor has a file of its own. Inside a file the order and the header are those of
    ``safetensors.save_file(..., metadata={"format": "pt"})`` 0.8: the bytes are the same. ``stem``
    begins every file name; an index can be written for ``model`` alone.

    Raises:
        ValueError: a name twice, an unknown dtype or an impossible shape.
        UsageError: ``max_shard_size`` is not positive.
    """
    if max_shard_size <= 0:
        raise UsageError(f"The shard size {max_shard_size} is not positive.", _SIZE_REMEDY)
    groups: list[list[tuple[OutputTensor, int]]] = [[]]
    room = max_shard_size
    seen = {"__metadata__"}
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"tensor {tensor.name!r} is planned twice")
        seen.add(tensor.name)
        size = _nbytes(tensor)
        if size > room and groups[-1]:
            groups.append([])
            room = max_shard_size
        groups[-1].append((tensor, size))
        room -= size
    count = len(groups)
    shards: list[PlannedShard] = []
    places: dict[str, Place] = {}
    for number, group in enumerate(groups, start=1):
        part = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
        name = f"{stem}{part}.safetensors"
        shards.append(_lay_out(name, group, places))
    total_size = sum(place.nbytes for place in places.values())
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    index = None if count == 1 else _index(places, total_size, parameters)
    return ShardPlan(tuple(shards), places, total_size, parameters, index)


def _nbytes(tensor: OutputTensor) -> int:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"tensor {tensor.name!r} has the unknown dtype {tensor.dtype!r}")
    if any(size < 0 for size in tensor.shape):
        raise ValueError(f"tensor {tensor.name!r} has the impossible shape {tensor.shape}")
    nbytes = DTYPES[tensor.dtype].nbytes(math.prod(tensor.shape))
    if nbytes is None:
        raise ValueError(f"tensor {tensor.name!r}: {tensor.dtype} {tensor.shape} splits a byte")
    return nbytes


def _lay_out(
    name: str, group: list[tuple[OutputTensor, int]], places: dict[str, Place]
) -> PlannedShard:
    """Header of one file; adds the place of its tensors to ``places``."""
    group = sorted(group, key=lambda item: (-DTYPES[item[0].dtype].rank, item[0].name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor, size in group:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    start = len(header)
    for tensor, size in group:
        places[tensor.name] = Place(name, start, size)
        start += size
    return PlannedShard(name, header, start)


def _index(places: dict[str, Place], total_size: int, parameters: int) -> bytes:
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total_size},
        "weight_map": {name: places[name].shard for name in sorted(places)},
    }
    return (json.dumps(index, indent=2) + "\n").encode("utf-8")


_SIZE_REMEDY = "Give bytes with a unit, e.g. 5GB (decimal), 4GiB (binary) or 500MB."


def parse_size(text: str | int) -> int:
    """Bytes of ``"5GB"`` (decimal units), ``"4GiB"`` (binary units) or ``5000000000``.

    Raises:
        UsageError: no number, an unknown unit (``5G`` and ``5B`` could mean several things), or
            less than one byte.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([a-z]*)\s*", str(text).lower(), re.ASCII)
    if match is None or match[2] not in _UNITS:
        raise UsageError(f"{text!r} is not a size.", _SIZE_REMEDY)
    size = int(Fraction(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise UsageError(f"The size {text!r} is less than one byte.", _SIZE_REMEDY)
    return size
