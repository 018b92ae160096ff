"""The header of one safetensors file: read strictly, in memory bounded by the header's length.

Format (github.com/huggingface/safetensors, README "Format"): an unsigned 64-bit little-endian
length, that many bytes of JSON ``{name: {dtype, shape, data_offsets}}``, then the tensors' bytes,
which must cover the rest of the file without gap or overlap.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growkit.checkpoint.dtypes import DTYPES
from growkit.core.errors import CheckpointError, nearest
from growkit.core.files import COPY_AGAIN, open_regular
from growkit.core.os_errors import about, system_failed

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
# One entry is three short fields. The limit keeps a hostile "shape" of millions of numbers from
# becoming millions of Python objects.
_MAX_ENTRY_CHARACTERS = 4096
_MAX_DIMENSIONS = 32  # numpy < 2 has no more
_MAX_METADATA_ENTRIES = 100_000
_MAX_TENSORS = 500_000  # in one file; the largest published models have some 200 000 in all
_MAX_ELEMENTS = 2**63 - 1
_SPACE = " \t\n\r"
_DECODER = json.JSONDecoder()
_PAIRS_DECODER = json.JSONDecoder(object_pairs_hook=list)  # built once: costs more than its use
# As every writer has it. What looks otherwise takes the JSON decoder, which is four times slower.
_N = "(?:0|[1-9][0-9]{0,17})"
_USUAL_ENTRY = re.compile(
    rf'\{{"dtype":"([A-Z0-9_]{{1,12}})","shape":\[((?:{_N}(?:,{_N}){{0,7}})?)\],'
    rf'"data_offsets":\[({_N}),({_N})\]\}}'
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies on disk.

    Attributes:
        name, dtype, shape: as in the header; dtype is a key of ``DTYPES``.
        shard: name of the file in the checkpoint folder.
        start: absolute byte offset of the tensor in that file.
        nbytes: its length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileHeader:
    """The checked header of one file.

    Attributes:
        path: the file.
        tensors: name -> place, in the order of the bytes on disk.
        metadata: the file's ``__metadata__`` (strings only).
        data_start: absolute byte offset of the first tensor.
        data_size: bytes of all tensors; the file ends at ``data_start + data_size``.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    data_size: int


def read_header(path: Path) -> FileHeader:
    """Read and check the header of one safetensors file; no tensor byte is read.

    Raises:
        CheckpointError: the file is missing, truncated or not a strictly valid safetensors file;
            the message names the file and, where there is one, the tensor.
    """
    text, data_start, file_size = _read_text(path)
    parser = _Parser(path.name, text)
    entries, metadata = parser.parse()
    data_size = file_size - data_start
    tensors: dict[str, TensorInfo] = {}
    position = 0
    file = path.name
    for begin, end, name, dtype, shape in sorted(entries):
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            what = f"tensor {name[:200]!r} {kind} (offset {begin}, not {position})"
            raise _broken(file, what)
        position = end
        tensors[name] = TensorInfo(name, dtype, shape, file, data_start + begin, end - begin)
    if position > data_size:
        raise CheckpointError(
            f"{path.name!r} is truncated: its header describes {position} bytes of tensors and the "
            f"file holds {max(data_size, 0)}.",
            COPY_AGAIN,
        )
    if position < data_size:
        raise _broken(path.name, f"{data_size - position} bytes after the last tensor")
    return FileHeader(path, tensors, metadata, data_start, data_size)


def _read_text(path: Path) -> tuple[str, int, int]:
    """(header text, offset of the tensors, size of the file), lengths checked before reading."""
    try:
        with open_regular(path) as file, about(path):
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if prefix == b"version ":
                raise CheckpointError(
                    f"{path.name!r} is a Git LFS pointer, not the weights.",
                    "Run 'git lfs pull' in the checkpoint's folder.",
                )
            if len(prefix) < 8:
                raise CheckpointError(f"{path.name!r} is truncated: {size} bytes.", COPY_AGAIN)
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES:
                raise _broken(
                    path.name, f"a header of {length} bytes, the limit is {MAX_HEADER_BYTES}"
                )
            if length > size - 8:
                raise CheckpointError(
                    f"{path.name!r} is truncated: its header takes {length} bytes and the file "
                    f"has {size}.",
                    COPY_AGAIN,
                )
            first = file.read(min(length, 1))
            if first != b"{":
                raise _broken(path.name, "a header that is not a JSON object")
            raw = first + file.read(length - 1)
    except OSError as error:
        if system_failed(error):
            raise
        raise CheckpointError(
            f"{path.name!r} cannot be read: {error.strerror}.", f"Look at {str(path.parent)!r}."
        ) from error
    if raw.count(b'"data_offsets"') > _MAX_TENSORS:  # before an entry is parsed
        raise _broken(path.name, f"more than {_MAX_TENSORS} tensors")
    if len(raw) != length:
        raise CheckpointError(f"{path.name!r} became shorter while it was read.", COPY_AGAIN)
    try:
        return raw.decode("utf-8"), 8 + length, size
    except UnicodeDecodeError as error:
        raise _broken(path.name, f"a header that is not UTF-8 (byte {error.start})") from error


def _broken(file: str, what: str) -> CheckpointError:
    return CheckpointError(f"{file!r} is not a valid safetensors file: {what}.", COPY_AGAIN)


_Entry = tuple[int, int, str, str, tuple[int, ...]]


class _Parser:
    """Reads the header entry by entry, so that no hostile value is built before it is refused."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text, self.end = file, text, 0

    def parse(self) -> tuple[list[_Entry], dict[str, str]]:
        """(begin, end, name, dtype, shape) of every tensor in header order, and the metadata."""
        entries: list[_Entry] = []
        metadata: dict[str, str] = {}
        seen: set[str] = set()
        position = 0
        for name, position in self._members(0):
            if name in seen:
                raise self._bad(name, "appears twice")
            if len(entries) == _MAX_TENSORS:
                raise _broken(self.file, f"more than {_MAX_TENSORS} tensors")
            seen.add(name)
            if name == "__metadata__":
                metadata, self.end = self._metadata(position)
            else:
                entries.append(self._entry(name, position))
        if self.text[self.end :].strip(_SPACE):
            raise _broken(self.file, "text after the header's JSON object")
        return entries, metadata

    def _members(self, position: int) -> Iterator[tuple[str, int]]:
        """Each key of the object at ``position`` with the place of its value.

        The caller must leave the end of that value in ``self.end``; at last ``self.end`` is the
        place after the closing brace.
        """
        if self.text[position : position + 1] != "{":
            raise _broken(self.file, f"a JSON object was expected at character {position}")
        position = self._skip(position + 1)
        if self.text[position : position + 1] == "}":
            self.end = position + 1
            return
        while True:
            name, position = self._string(position)
            position = self._skip(position)
            if self.text[position : position + 1] != ":":
                raise _broken(self.file, f"':' was expected after {name[:80]!r}")
            yield name, self._skip(position + 1)
            position = self._skip(self.end)
            separator = self.text[position : position + 1]
            if separator == "}":
                self.end = position + 1
                return
            if separator != ",":
                raise _broken(self.file, f"',' or '}}' was expected after {name[:80]!r}")
            position = self._skip(position + 1)

    def _skip(self, position: int) -> int:
        while self.text[position : position + 1] in (" ", "\t", "\n", "\r"):
            position += 1
        return position

    def _string(self, position: int) -> tuple[str, int]:
        if self.text[position : position + 1] != '"':
            raise _broken(self.file, f"a string was expected at character {position}")
        close = self.text.find('"', position + 1)
        usual = self.text[position + 1 : close]
        if close > 0 and usual.isascii() and usual.isprintable() and "\\" not in usual:
            return usual, close + 1
        try:
            value, end = _DECODER.raw_decode(self.text, position)
            value.encode("utf-8")
        except ValueError as error:  # JSONDecodeError, or a lone surrogate
            raise _broken(self.file, f"a damaged string at character {position}") from error
        return value, end

    def _metadata(self, position: int) -> tuple[dict[str, str], int]:
        metadata: dict[str, str] = {}
        for key, place in self._members(position):
            if key in metadata:
                raise _broken(self.file, f"key {key[:80]!r} of __metadata__ appears twice")
            if len(metadata) == _MAX_METADATA_ENTRIES:
                raise _broken(self.file, f"more than {_MAX_METADATA_ENTRIES} keys in __metadata__")
            metadata[key], self.end = self._string(place)
        return metadata, self.end

    def _entry(self, name: str, position: int) -> _Entry:
        dtype, shape, offsets = self._usual(position) or self._decoded(name, position)
        if type(dtype) is not str or dtype not in DTYPES:
            given = str(dtype)[:40]
            raise CheckpointError(
                f"Tensor {name[:200]!r} in {self.file!r} has the unknown dtype {given!r}.",
                f"{nearest(given, DTYPES)}Known: {', '.join(DTYPES)}.",
            )
        if not _natural_numbers(shape) or len(shape) > _MAX_DIMENSIONS:
            raise self._bad(name, f"has the impossible shape {str(shape)[:80]}")
        if not _natural_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._bad(name, f"has the impossible data_offsets {str(offsets)[:80]}")
        elements = extent = 1
        for size in shape:
            elements *= size
            extent *= max(size, 1)
        # `extent`: (2**62, 2**62, 0) has no element, and yet no array library can hold it.
        size = DTYPES[dtype].nbytes(elements)
        if extent > _MAX_ELEMENTS or size is None:
            raise self._bad(name, f"has the impossible shape {str(shape)[:80]} for {dtype}")
        begin, end = offsets
        if end - begin != size:
            raise self._bad(
                name, f"has {end - begin} bytes, but {dtype} {list(shape)} takes {size} bytes"
            )
        return begin, end, name, dtype, tuple(shape)

    def _usual(self, position: int) -> tuple[Any, Any, Any] | None:
        found = _USUAL_ENTRY.match(self.text, position)
        if found is None:
            return None
        self.end = found.end()
        dtype, sizes, begin, end = found.groups()
        shape = [int(size) for size in sizes.split(",")] if sizes else []
        return dtype, shape, [int(begin), int(end)]

    def _decoded(self, name: str, position: int) -> tuple[Any, Any, Any]:
        close = self.text.find("}", position, position + _MAX_ENTRY_CHARACTERS)
        if close < 0 or self.text[position] != "{":
            raise self._bad(name, "has no description of dtype, shape and data_offsets")
        self.end = close + 1
        try:
            pairs = _PAIRS_DECODER.decode(self.text[position : close + 1])
        except (ValueError, RecursionError) as error:
            raise self._bad(name, "is not described by valid JSON") from error
        fields: dict[str, Any] = dict(pairs)
        if len(pairs) != 3 or fields.keys() != {"dtype", "shape", "data_offsets"}:
            given = ", ".join(str(key) for key, _ in pairs)
            raise self._bad(name, f"must have dtype, shape and data_offsets once each, not {given}")
        return fields["dtype"], fields["shape"], fields["data_offsets"]

    def _bad(self, name: str, what: str) -> CheckpointError:
        return _broken(self.file, f"tensor {name[:200]!r} {what}")


def _natural_numbers(value: Any) -> bool:
    return type(value) is list and all(
        type(item) is int and 0 <= item <= _MAX_ELEMENTS for item in value
    )
