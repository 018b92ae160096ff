"""An opened checkpoint folder: config, header of every shard, and positional reads."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from growkit.checkpoint.dtypes import DTYPES
from growkit.checkpoint.header import FileHeader, TensorInfo, read_header
from growkit.checkpoint.hub import not_a_folder
from growkit.checkpoint.layout import INDEX_FILE, MAX_CONFIG_BYTES, find_weights, other_format
from growkit.checkpoint.links import check_links
from growkit.checkpoint.older_config import current_form
from growkit.checkpoint.reading import OpenFiles, byte_view, read_exactly
from growkit.checkpoint.unchanged import Unchanged
from growkit.core import systems
from growkit.core.errors import CheckpointError, UsageError, nearest
from growkit.core.files import COPY_AGAIN, read_bytes
from growkit.core.json_files import parse_json_object
from growkit.core.names import CONFIG
from growkit.core.os_errors import about


class Checkpoint:
    """A checkpoint folder of which only config and headers have been read.

    Files are opened when they are read, and as many as the process can afford stay open until
    :meth:`close` (or the end of ``with``). All methods may be called from several threads.

    Attributes:
        path: the folder.
        config: the content of config.json, older forms in today's words.
        config_bytes: config.json as it lies on disk.
        tensors: name -> place on disk, shard by shard, in the order of the bytes.
        shards: file names, sorted.
        total_size: bytes of all tensors.
        files: how the files of the folder looked before they were read.
    """

    def __init__(
        self,
        path: Path,
        config_bytes: bytes,
        headers: Mapping[str, FileHeader],
        files: Unchanged | None = None,
    ) -> None:
        self.path = path
        self.files = files or Unchanged()
        self.config_bytes = config_bytes
        self.config = current_form(
            parse_json_object(config_bytes, str(path / CONFIG), non_finite=True)
        )
        self.shards = tuple(headers)
        self.tensors: dict[str, TensorInfo] = {}
        for header in headers.values():
            for name, info in header.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"Tensor {name!r} is in two shards: {self.tensors[name].shard!r} and "
                        f"{info.shard!r}.",
                        "Remove the shard that is left over from another save.",
                    )
                self.tensors[name] = info
        self.total_size = sum(header.data_size for header in headers.values())
        self._open = OpenFiles(self._open_shard)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors)"

    def info(self, name: str) -> TensorInfo:
        """The place of one tensor; CheckpointError with the nearest name where there is none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"There is no tensor {name!r} in {self.path.name!r}.", nearest(name, self.tensors)
            ) from None

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """One whole tensor as a fresh, writable array of its shape."""
        info = self.info(name)
        kind = DTYPES[info.dtype].numpy
        if kind is None:
            raise CheckpointError(
                f"Tensor {name!r} has the packed dtype {info.dtype}, which can only be copied."
            )
        array = np.empty(info.shape, dtype=kind)
        self.read_into(name, array, 0)
        return array

    def read_into(self, name: str, buffer: Any, offset: int = 0) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset`` on.

        Args:
            name: the tensor.
            buffer: anything writable and contiguous (memoryview, bytearray, ndarray).
            offset: first byte, counted from the start of the tensor.

        Raises:
            ValueError: the range is not inside the tensor.
            CheckpointError: the file has become shorter since it was opened.
        """
        info = self.info(name)
        view = byte_view(buffer)
        if offset < 0 or offset + len(view) > info.nbytes:
            raise ValueError(
                f"bytes {offset}..{offset + len(view)} are not inside {name!r} ({info.nbytes})"
            )
        with self._open.use(info.shard) as descriptor, about(self.path / info.shard):
            got = read_exactly(descriptor, view, info.start + offset)
        if got != len(view):
            raise CheckpointError(
                f"{info.shard!r} ended inside tensor {name!r}: it changed while it was read.",
                COPY_AGAIN,
            )

    def read_rows(self, name: str, first: int, count: int, start: int = 0) -> np.ndarray[Any, Any]:
        """Rows [first, first + count) of a matrix, or of the one ``start`` bytes into a stack."""
        width = self.tensors[name].shape[-1]
        return self._read_part(name, (count, width), first * width, start)

    def read_entries(self, name: str, first: int, count: int) -> np.ndarray[Any, Any]:
        """Entries [first, first + count) of a tensor of any shape."""
        return self._read_part(name, (count,), first, 0)

    def _read_part(
        self, name: str, shape: tuple[int, ...], first: int, start: int
    ) -> np.ndarray[Any, Any]:
        kind = DTYPES[self.tensors[name].dtype].numpy
        assert kind is not None
        block = np.empty(shape, kind)
        self.read_into(name, block, start + first * block.itemsize)
        return block

    def descriptor(self, shard: str) -> int:
        """A descriptor of one shard for positional reads, open until :meth:`close`; ours."""
        return self._open.pin(shard)

    def opened(self, shard: str) -> AbstractContextManager[int]:
        """A descriptor of one shard for positional reads, open until the end of ``with``."""
        return self._open.use(shard)

    def _open_shard(self, shard: str) -> int:
        if shard not in self.shards:
            raise ValueError(f"{shard!r} is not a shard of {self.path}")
        return os.open(self.path / shard, os.O_RDONLY | systems.PLAIN)

    def check_unchanged(self, also: Iterable[str] = ()) -> None:
        """Raise CheckpointError when a file that was read has changed since.

        Args:
            also: names of files in the folder that were read besides config, index and shards.
        """
        names = (CONFIG, INDEX_FILE, *self.shards, *also)
        self.files.check(self.path / name for name in names)

    def close(self) -> None:
        """Close every open file. The checkpoint may be used again; files are then reopened."""
        self._open.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_checkpoint(path: Path, *, require_tensors: bool = True) -> Checkpoint:
    """Open a Hugging Face folder: config.json, and one safetensors file or an index with shards.

    Args:
        path: the folder.
        require_tensors: with False a folder without any weights (a config alone) is accepted.

    Raises:
        UsageError: ``path`` is not a checkpoint folder, or one of a format that is not read.
        CheckpointError: the folder is damaged: a link that leads out of it, bad JSON, a missing or
            truncated shard, an index that disagrees with its shards, files of two saves mixed.
    """
    path = Path(path)
    if not path.is_dir():
        raise not_a_folder(path)
    check_links(path)
    config_path = path / CONFIG
    if not config_path.is_file():
        raise other_format(path, os.listdir(path)) or UsageError(
            f"{str(path)!r} has no config.json.", "Give the folder of a Hugging Face checkpoint."
        )
    files = Unchanged(path)
    config_bytes = read_bytes(config_path, limit=MAX_CONFIG_BYTES)
    weight_map = find_weights(path, require_tensors)
    headers = {shard: read_header(path / shard) for shard in weight_map}
    checkpoint = Checkpoint(path, config_bytes, headers, files)
    for shard, expected in weight_map.items():
        if expected is not None:
            _compare(path, shard, expected, headers[shard])
    return checkpoint


def _compare(path: Path, shard: str, expected: set[str], header: FileHeader) -> None:
    remedy = (
        "Copy or download the index and the shards of one save, or rebuild the index: "
        f"growkit index {shlex.quote(str(path))}"
    )
    for name in sorted(expected - header.tensors.keys()):
        raise CheckpointError(
            f"{INDEX_FILE} expects tensor {name!r} in {shard!r}, which does not have it.",
            remedy,
        )
    for name in sorted(header.tensors.keys() - expected):
        raise CheckpointError(
            f"{shard!r} has tensor {name!r}, which {INDEX_FILE} does not put there.",
            remedy,
        )
