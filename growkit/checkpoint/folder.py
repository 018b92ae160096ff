"""An opened checkpoint folder: config, header of every shard, and positional reads."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from growkit.checkpoint.dtypes import DTYPES
from growkit.checkpoint.header import COPY_AGAIN, FileHeader, TensorInfo, read_header
from growkit.checkpoint.raw_bytes import byte_view, read_exactly
from growkit.errors import CheckpointError, UsageError, nearest

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_CONFIG_BYTES = 16_000_000
_MAX_INDEX_BYTES = 64_000_000
_MODEL_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


class Checkpoint:
    """A checkpoint folder of which only config and headers have been read.

    Files are opened at the first read and stay open until :meth:`close` (or the end of ``with``).
    All methods may be called from several threads.

    Attributes:
        path: the folder.
        config: the content of config.json.
        config_bytes: config.json as it lies on disk.
        tensors: name -> place on disk, shard by shard, in the order of the bytes.
        shards: file names, sorted.
        total_size: bytes of all tensors.
    """

    def __init__(self, path: Path, config_bytes: bytes, headers: Mapping[str, FileHeader]) -> None:
        self.path = path
        self.config_bytes = config_bytes
        self.config: dict[str, Any] = _parse_object(config_bytes, "config.json")
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
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

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
        got = read_exactly(self.descriptor(info.shard), view, info.start + offset)
        if got != len(view):
            raise CheckpointError(
                f"{info.shard!r} ended inside tensor {name!r}: it changed while it was read.",
                COPY_AGAIN,
            )

    def descriptor(self, shard: str) -> int:
        """A file descriptor of one shard for positional reads; ours to close."""
        with self._lock:
            if shard not in self._descriptors:
                if shard not in self.shards:
                    raise ValueError(f"{shard!r} is not a shard of {self.path}")
                self._descriptors[shard] = os.open(self.path / shard, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[shard]

    def close(self) -> None:
        """Close every open file. The checkpoint may be used again; files are then reopened."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

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
        CheckpointError: the folder is damaged: bad JSON, a missing or truncated shard, an index
            that disagrees with its shards, files of two saves mixed.
    """
    path = Path(path)
    if not path.is_dir():
        raise _not_a_folder(path)
    config_path = path / "config.json"
    if not config_path.is_file():
        raise UsageError(
            f"{str(path)!r} has no config.json.", "Give the folder of a Hugging Face checkpoint."
        )
    config_bytes = _read_limited(config_path, _MAX_CONFIG_BYTES)
    weight_map = _find_weights(path, require_tensors)
    headers = {shard: read_header(path / shard) for shard in weight_map}
    checkpoint = Checkpoint(path, config_bytes, headers)
    for shard, expected in weight_map.items():
        if expected is not None:
            _compare(shard, expected, headers[shard])
    return checkpoint


def _not_a_folder(path: Path) -> UsageError:
    if path.exists():
        return UsageError(
            f"{str(path)!r} is a file, not a folder.", "Give the folder that holds config.json."
        )
    siblings: list[str] = []
    if path.parent.is_dir():
        siblings = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
    old = [name for name in siblings if name.startswith(f"{path.name}.old-")]
    if old:
        remedy = f"An interrupted --overwrite left the old folder as {old[0]!r}: rename it back."
    else:
        remedy = nearest(path.name, siblings) + (
            "Give a local folder; a checkpoint on the Hub is downloaded first, with "
            "'hf download NAME --local-dir FOLDER'."
        )
    return UsageError(f"There is no folder {str(path)!r}.", remedy)


def _find_weights(path: Path, required: bool) -> dict[str, set[str] | None]:
    """Shard -> names that the index expects in it (None without an index), sorted by shard."""
    files = {entry.name for entry in os.scandir(path)}
    numbered = sorted(name for name in files if _MODEL_SHARD.fullmatch(name))
    if INDEX_FILE not in files:
        if SINGLE_FILE in files:
            if numbered:
                raise _mixed(SINGLE_FILE, numbered)
            return {SINGLE_FILE: None}
        if numbered:
            raise CheckpointError(
                f"{str(path)!r} has {numbered[0]!r} but no {INDEX_FILE}.",
                "Copy or download the index too.",
            )
        if required:
            raise _no_weights(path, files)
        return {}
    weight_map = _read_index(path / INDEX_FILE)
    missing = [shard for shard in weight_map if shard not in files]
    if missing:
        raise CheckpointError(
            f"{INDEX_FILE} names {len(missing)} missing shard(s): {', '.join(missing[:5])}.",
            "Copy or download them too.",
        )
    if SINGLE_FILE in files and SINGLE_FILE not in weight_map:
        # from_pretrained would load the single file and ignore the index without a word.
        raise _mixed(SINGLE_FILE, [INDEX_FILE])
    stale = [name for name in numbered if name not in weight_map]
    if stale:
        raise _mixed(stale[0], [INDEX_FILE])
    return {shard: weight_map[shard] for shard in sorted(weight_map)}


def _mixed(first: str, others: list[str]) -> CheckpointError:
    return CheckpointError(
        f"The folder mixes two saves: {first!r} does not belong to {others[0]!r}.",
        "Remove the files of the older one.",
    )


def _no_weights(path: Path, files: set[str]) -> UsageError:
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in files):
        return UsageError(
            f"{str(path)!r} has pytorch_model.bin weights, and only safetensors is read.",
            'Convert it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}', dtype='auto').save_pretrained('{path}-safetensors')\"",
        )
    return UsageError(
        f"{str(path)!r} has no weights.", f"It must hold {SINGLE_FILE} or {INDEX_FILE} with shards."
    )


def _read_index(path: Path) -> dict[str, set[str] | None]:
    index = _parse_object(_read_limited(path, _MAX_INDEX_BYTES), path.name)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name!r} has no weight_map.", COPY_AGAIN)
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _plain_file_name(shard):
            raise CheckpointError(
                f"{path.name!r} puts tensor {name!r} into {shard!r}, which is not the name of a "
                "safetensors file in the folder.",
                "Do not use this index: it may come from an untrusted source.",
            )
        shards.setdefault(shard, set()).add(name)
    return dict(shards)


def _plain_file_name(name: str) -> bool:
    """No folder, no drive, no hidden file: the index must not lead out of the checkpoint."""
    return (
        name.endswith(".safetensors")
        and not name.startswith(".")
        and not any(letter in "/\\:" or not letter.isprintable() for letter in name)
    )


def _compare(shard: str, expected: set[str], header: FileHeader) -> None:
    for name in sorted(expected - header.tensors.keys()):
        raise CheckpointError(
            f"{INDEX_FILE} expects tensor {name!r} in {shard!r}, which does not have it.",
            "Copy or download the index and the shards of one save.",
        )
    for name in sorted(header.tensors.keys() - expected):
        raise CheckpointError(
            f"{shard!r} has tensor {name!r}, which {INDEX_FILE} does not put there.",
            "Copy or download the index and the shards of one save.",
        )


def _read_limited(path: Path, limit: int) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path.name!r} cannot be read: {error.strerror}.") from error
    if len(content) > limit:
        raise CheckpointError(f"{path.name!r} is larger than {limit} bytes.", COPY_AGAIN)
    return content


def _parse_object(content: bytes, file: str) -> dict[str, Any]:
    """Content of a JSON file that must be one object with no key twice."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file!r} is not valid JSON: {error}.", COPY_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file!r} is not a JSON object.", COPY_AGAIN)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:80]!r} appears twice")
            seen.add(key)
    return value
