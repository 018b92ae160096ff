# SPDX-License-Identifier: Apache-2.0
"""Which token files the entries of a recipe stand for; and folders with an ``index.json``.

=============  ===================================================================================
litdata        chunks as ``TokensLoader`` reads them: uint32 items n, uint32 [n + 1] byte offsets,
               then ids; each item is a document (litdata/streaming/item_loader.py)
MDS            MosaicML's StreamingDataset: uint32 samples n, uint32 [n + 1] byte offsets, JSON with
               the columns, then samples: uint32 sizes of the columns that have none fixed, and the
               columns (streaming/base/format/mds). Ids are a column ``tokens`` or ``input_ids`` of
               one-dimensional arrays, or int64 as bytes, and so are no flat run: they are copied.
=============  ===================================================================================

All numbers are little-endian. Compressed files are decompressed whole, one at a time, into the
cache.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from growkit.core.errors import GrowkitError, UsageError, shown
from growkit.core.json_files import parse_json_object, read_json_object
from growkit.data.remote_files import is_remote, url_of
from growkit.data.text_files import import_pyarrow
from growkit.data.token_formats import TokenFile, damaged, open_bin, open_ds

KINDS = (
    ".bin with .idx (Megatron-LM), .bin (nanoGPT, llm.c), .ds (datatrove), folders of litdata and "
    "of MosaicML's StreamingDataset"
)
_LITDATA_TYPES = {
    "no_header_tensor": {11: "<u1", 12: "<i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4",
                         17: "<i8", 18: "<i8", 20: "<u2"},
    "no_header_numpy": dict(enumerate(("<i1", "<i2", "<i4", "<i8", "<u1", "<u2", "<u4", "<u8"))),
}  # fmt: skip
# By how the file's name ends (in front of litdata's .bin), as pyarrow calls them.
_CODECS = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2", "br": "brotli"}
_MDS_COLUMNS = ("tokens", "input_ids")


def find_token_files(entries: Iterable[Path], dtype: str | None = None) -> list[TokenFile]:
    """The token files that the entries of a recipe stand for; each comes once.

    An entry is a file, a pattern, a prefix as Megatron-LM takes it (``X`` for ``X.bin`` and
    ``X.idx``), or a folder: of litdata or MDS, or with files of the other kinds at any depth.

    Args:
        dtype: of ids in files that do not say: ``uint16`` or ``uint32``.

    Raises:
        UsageError: an entry is missing or of an unknown kind.
        GrowkitError: a file is damaged, as far as its head and its size tell.
    """
    found: dict[Path, TokenFile] = {}
    for entry in entries:
        for path in _paths(entry):
            for file in _open(path):
                if not file.dtype and dtype is not None:
                    file = replace(file, dtype={"uint16": "<u2", "uint32": "<u4"}[dtype])
                if file.dtype:
                    len(file)  # raises
                found.setdefault(file.path, file)
    return list(found.values())


def _paths(entry: Path) -> list[Path]:
    if is_remote(entry):
        raise UsageError(
            f"The token files {url_of(entry)!r} are on an object store, and are memory-mapped.",
            "Copy them to a disk first; text is read from there as it is (data.files).",
        )
    if (entry / "index.json").is_file():
        return [entry]
    if entry.is_dir():
        below = sorted(path for path in entry.rglob("*") if path.suffix in (".bin", ".ds"))
        if not below:
            raise UsageError(
                f"The folder {str(entry)!r} holds no token files.", f"Known kinds: {KINDS}."
            )
        return below
    if glob.has_magic(str(entry)) and not entry.exists():
        names = map(Path, sorted(glob.glob(str(entry), recursive=True)))
        matching = [path for path in names if path.is_dir() or path.suffix in (".bin", ".ds")]
        if not matching:
            raise UsageError(
                f"No token file matches the pattern {str(entry)!r}.",
                "Paths are relative to the current folder; ** stands for any depth.",
            )
        return [path for match in matching for path in _paths(match)]
    prefixed = entry.with_name(entry.name + ".bin")
    if not entry.exists() and prefixed.is_file():
        return [prefixed]
    if not entry.is_file():
        raise UsageError(
            f"The token file {str(entry)!r} does not exist.",
            "Paths are relative to the current folder.",
        )
    return [entry]


def _open(path: Path) -> list[TokenFile]:
    if path.is_dir():
        values = read_json_object(path / "index.json")
        if isinstance(values.get("shards"), list):
            return _mds(path, values["shards"])
        return _litdata(path, values)
    if path.suffix == ".ds":
        return [open_ds(path)]
    if path.suffix == ".idx":
        path = path.with_suffix(".bin")
        if not path.is_file():
            raise UsageError(
                f"The token file {str(path)!r} does not exist.", "It belongs to the .idx file."
            )
    if path.suffix != ".bin":
        raise UsageError(
            f"The token file {str(path)!r} is of an unknown kind.", f"Known kinds: {KINDS}."
        )
    return [open_bin(path)]


@dataclass(frozen=True)
class _Decompressed(TokenFile):
    """A file that may be stored compressed.

    Attributes:
        raw: its bytes once it is decompressed, as its index says; 0: it is stored as it is.
    """

    raw: int = 0

    def content(self) -> np.ndarray:
        """The bytes, decompressed: uint8."""
        if not self.raw:
            return np.memmap(self.path, np.uint8, mode="r")
        stat = self.path.stat()
        return _decompressed(self, stat.st_size, stat.st_mtime_ns)

    def head(self, dtype: str, count: int, offset: int = 0) -> np.ndarray:
        """Numbers at the beginning.

        Raises:
            GrowkitError: the file has fewer.
        """
        if not self.raw:
            return self.integers(self.path, dtype, count, offset)
        data, end = self.content(), offset + count * np.dtype(dtype).itemsize
        if end > len(data):
            raise self.damaged("its index is cut off")
        return np.frombuffer(data[offset:end].tobytes(), dtype)


@lru_cache(maxsize=1)
def _decompressed(file: _Decompressed, size: int, changed: int) -> np.ndarray:
    """The content of a compressed file; the sizes tell a file that was written anew."""
    arrow = import_pyarrow("pyarrow", file.path)
    codec = _CODECS[file.path.name.removesuffix(".bin").rpartition(".")[2]]
    try:
        with arrow.input_stream(str(file.path), compression=codec) as stream:
            data = stream.read(file.raw + 1)
    except OSError as error:
        raise file.damaged(f"it cannot be decompressed ({error})") from error
    if len(data) != file.raw:
        found = "more" if len(data) > file.raw else f"{len(data):,}"
        raise file.damaged(f"it decompresses to {found} bytes and its index says {file.raw:,}")
    return np.frombuffer(data, np.uint8)


class LitdataChunk(_Decompressed):
    """A chunk of a litdata folder."""

    kind = "litdata"

    def document_ends(self) -> np.ndarray | None:
        """See :class:`TokenFile`."""
        header = self.head("<u4", self.offset // 4)
        if int(header[0]) != len(header) - 2 or int(header[1]) != self.offset:
            raise self.damaged("its offsets do not begin where its ids do")
        return self.checked_ends((header[2:].astype(np.int64) - self.offset) // self._item)


class CompressedChunk(LitdataChunk):
    """A chunk that is one compressed file."""

    mapped = False

    def __len__(self) -> int:
        """See :class:`TokenFile`."""
        ids, rest = divmod(self.raw - self.offset, self._item)
        if rest or ids <= 0:
            raise self.damaged(f"{self.raw:,} bytes are no whole number of ids behind a head")
        return ids

    def tokens(self) -> np.ndarray:
        """The ids, read into memory."""
        return np.frombuffer(self.content(), self.dtype, offset=self.offset)


def _litdata(folder: Path, values: Mapping[str, Any]) -> list[TokenFile]:
    index = folder / "index.json"
    config, chunks = values.get("config"), values.get("chunks")
    if not isinstance(config, dict) or not isinstance(chunks, list):
        raise UsageError(
            f"{str(index)!r} is no index of token files: it has neither 'config' and 'chunks' "
            "(litdata) nor 'shards' (MDS).",
            f"Known kinds: {KINDS}.",
        )
    formats = config.get("data_format")
    name, _, code = str(formats[0] if isinstance(formats, list) and formats else "").partition(":")
    dtype = _LITDATA_TYPES.get(name, {}).get(int(code) if code.isdecimal() else -1)
    codec = str(config.get("compression") or "").partition(":")[0]
    whole = codec in ("", *_CODECS) and config.get("compression_level") in (None, "chunk")
    other = "encryption" if config.get("encryption") else None if whole else "compression"
    if dtype is None or other is not None or not isinstance(formats, list) or len(formats) != 1:
        what = f"{other} {json.dumps(config[other])}" if other else f"data_format {shown(formats)}"
        raise UsageError(
            f"{str(folder)!r} is a litdata folder with {what}, no plain token ids.",
            "Write it with item_loader=TokensLoader() and one 1-d integer tensor an item, "
            "uncompressed or with compression='zstd' of whole chunks.",
        )
    found: list[TokenFile] = []
    for chunk in chunks:
        fields = chunk if isinstance(chunk, dict) else {}
        file, items, size = (fields.get(key) for key in ("filename", "chunk_size", "chunk_bytes"))
        if not (isinstance(file, str) and isinstance(items, int) and isinstance(size, int)):
            raise damaged(index, LitdataChunk.kind, f"a chunk is {shown(chunk)}")
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise damaged(index, LitdataChunk.kind, f"its chunk {shown(file)} is not there")
        if codec and file.endswith(f".{codec}.bin"):
            found.append(CompressedChunk(path, dtype, offset=4 * (items + 2), raw=size))
            continue
        if path.stat().st_size != size:
            raise damaged(
                path,
                LitdataChunk.kind,
                f"it has {path.stat().st_size:,} bytes and its index says {size:,}",
            )
        found.append(LitdataChunk(path, dtype, offset=4 * (items + 2)))
    return found


class MdsShard(_Decompressed):
    """A shard of MosaicML's StreamingDataset; the ids of its samples follow each other."""

    kind = "MDS"
    mapped = False

    def __len__(self) -> int:
        """See :class:`TokenFile`."""
        count = int(self._spans()[1].sum()) // self._item
        if count == 0:
            raise self.damaged("it holds no tokens")
        return count

    def tokens(self) -> np.ndarray:
        """The ids of all samples, read into memory."""
        data = self.content()
        pieces = [
            data[start : start + size] for start, size in zip(*self._spans(), strict=True) if size
        ]
        return np.frombuffer(np.concatenate([data[:0], *pieces]).tobytes(), self.dtype)

    def _spans(self) -> tuple[np.ndarray, np.ndarray]:
        """(first byte, bytes) of the ids of each sample, int64 ``[samples]``."""
        (samples,) = self.head("<u4", 1).astype(np.int64)
        offsets = self.head("<u4", int(samples) + 1, 4).astype(np.int64)
        data = self.content()
        begin = 4 * (int(samples) + 2)
        if (np.diff(offsets, prepend=begin) < 0).any() or int(offsets[-1]) != len(data):
            raise self.damaged("its offsets do not fit its size")
        columns = self._columns(bytes(data[begin : int(offsets[0])]))
        starts, ends = offsets[:-1], offsets[1:]
        free = [name for name, _, size in columns if not size]
        names = [name for name, _, _ in columns]
        ids = next((name for name in _MDS_COLUMNS if name in names), None)
        if ids is None:
            raise self.damaged("its head names no column of ids")
        if len(starts) and int((ends - starts).min()) < 4 * len(free):
            raise self.damaged("a sample is shorter than its head")
        at, where, length = starts + 4 * len(free), starts, starts
        for name, encoding, size in columns:
            number = free.index(name) if name in free else -1
            sizes = np.full_like(starts, size) if size else _uint32(data, starts + 4 * number)
            if name == ids:
                where, length = at, sizes
                if not size and encoding != "bytes":  # the shape stands before the values
                    if (at >= ends).any():
                        raise self.damaged("a sample is shorter than its columns")
                    code = data[at].astype(np.int64)
                    if (code >> 2 != 1).any():
                        raise self.damaged("a sample has no one-dimensional array of ids")
                    prefix = 1 + (1 << (code & 3))
                    where, length = at + prefix, sizes - prefix
            at = at + sizes
        if (
            (at > ends).any()
            or (where < starts).any()
            or (length < 0).any()
            or (length % self._item).any()
        ):
            raise self.damaged("a sample is shorter than its columns")
        return where, length

    def _columns(self, text: bytes) -> list[tuple[str, str, int]]:
        """(name, encoding, bytes; 0 for those that differ) of each column."""
        try:
            config = parse_json_object(text, str(self.path), error=GrowkitError)
            names, encodings, sizes = (
                config[f"column_{what}"] for what in ("names", "encodings", "sizes")
            )
            return [
                (str(name), str(encoding), int(size or 0))
                for name, encoding, size in zip(names, encodings, sizes, strict=True)
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise self.damaged("its head names no columns") from error


def _uint32(data: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The numbers that begin at some bytes, as int64."""
    parts = data[at[:, None] + np.arange(4)]
    return np.ascontiguousarray(parts).view("<u4")[:, 0].astype(np.int64)


def _mds(folder: Path, shards: list[Any]) -> list[TokenFile]:
    index, found = folder / "index.json", list[TokenFile]()
    for shard in shards:
        try:
            form, version, raw = shard["format"], shard["version"], shard["raw_data"]
            columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
            name, size = str(raw["basename"]), int(raw["bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(index, MdsShard.kind, f"a shard is {shown(shard)}") from error
        column = next((column for column in _MDS_COLUMNS if column in columns), None)
        encoding = str(columns.get(column))
        kind, _, rest = encoding.partition(":")
        dtype = rest.partition(":")[0]
        if (
            form != "mds"
            or version != 2
            or column is None
            or not (
                encoding == "bytes" or (kind == "ndarray" and dtype.lstrip("u").startswith("int"))
            )
        ):
            raise UsageError(
                f"{str(folder)!r} holds {shown(form)} version {shown(version)} with the columns "
                f"{shown(columns)}, no token ids.",
                "Token ids are a column 'tokens' of 'ndarray:int32' (or of another whole type) or "
                "'bytes' (int64); text is read from .jsonl or .parquet files.",
            )
        path, raw_size = folder / name, 0
        stored: Any = size
        zipped = shard.get("zip_data")
        if not path.is_file() and isinstance(zipped, dict):
            name, stored, raw_size = str(zipped.get("basename")), zipped.get("bytes"), size
            path = folder / name
            if path.suffix[1:] not in _CODECS:
                codec = shown(shard.get("compression"))
                raise UsageError(
                    f"{str(folder)!r} has shards with compression {codec}.",
                    f"Known: {', '.join(_CODECS)}; or decompress them beside the index.",
                )
        if Path(name).name != name or not path.is_file():
            raise damaged(index, MdsShard.kind, f"its shard {shown(name)} is not there")
        if path.stat().st_size != stored:
            raise damaged(
                path,
                MdsShard.kind,
                f"it has {path.stat().st_size:,} bytes and its index says {shown(stored)}",
            )
        ids = "<i8" if encoding == "bytes" else np.dtype(dtype).str
        found.append(MdsShard(path, ids, raw=raw_size))
    return found
