# SPDX-License-Identifier: Apache-2.0
"""Token files of other tools, as flat runs of ids that can be memory-mapped.

=============  ===================================================================================
Megatron-LM    ``X.bin`` (ids) and ``X.idx``: ``MMIDIDX\\0\\0``, uint64 version 1, uint8 code of the
               type, uint64 sequences n and documents d, int32 [n] lengths, int64 [n] byte offsets,
               int64 [d] first sequence of each document and the end
               (megatron/core/datasets/indexed_dataset.py)
llm.c          ``X.bin``: int32 [256] header (20240520, version 1: uint16; 20240801, version 7:
               uint32; number of ids), then ids (dev/data/data_common.py)
nanoGPT        ``X.bin``: nothing but ids, uint16 (data/openwebtext/prepare.py)
datatrove      ``X.ds``: ids, uint16 or uint32; ``X.ds.index``: uint64, where documents end
               (datatrove/pipeline/tokens/tokenizer.py)
litdata        a folder: ``index.json`` and chunks as ``TokensLoader`` reads them: uint32 items n,
               uint32 [n + 1] byte offsets, then ids (litdata/streaming/item_loader.py)
=============  ===================================================================================

All numbers are little-endian. Where nothing says where documents end, the end-of-text token does.
"""

from __future__ import annotations

import glob
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from growkit.core.errors import GrowkitError, UsageError, shown
from growkit.core.files import COPY_AGAIN, open_regular
from growkit.core.json_files import read_json_object

MEGATRON, LLM_C, RAW, DATATROVE, LITDATA = "Megatron-LM", "llm.c", "nanoGPT", "datatrove", "litdata"
KINDS = ".bin with .idx (Megatron-LM), .bin (nanoGPT, llm.c), .ds (datatrove), folders of litdata"
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER = 34
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LLM_C = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
_LLM_C_HEADER, _LLM_C_QUESTIONS = 1024, 20240522
_LITDATA_TYPES = {
    "no_header_tensor": {11: "<u1", 12: "<i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4",
                         17: "<i8", 18: "<i8", 20: "<u2"},
    "no_header_numpy": dict(enumerate(("<i1", "<i2", "<i4", "<i8", "<u1", "<u2", "<u4", "<u8"))),
}  # fmt: skip


@dataclass(frozen=True)
class TokenFile:
    """A file with a flat run of token ids.

    Attributes:
        kind: which tool's.
        dtype: of the ids; empty where the file does not say (see :meth:`as_type`).
        offset: bytes before the first id.
        index: the file that says where documents end; None: the ids' own file, or nothing does.
    """

    path: Path
    kind: str
    dtype: str = ""
    offset: int = 0
    index: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All that is read."""
        return [self.path, *([self.index] if self.index is not None else [])]

    @property
    def says_ends(self) -> bool:
        """Whether the format itself says where documents end."""
        return self.index is not None or self.kind == LITDATA

    def as_type(self, vocabulary: int) -> TokenFile:
        """With a type: uint16 when ``vocabulary`` ids fit into it, else uint32."""
        dtype = self.dtype or ("<u2" if vocabulary <= 1 << 16 else "<u4")
        return replace(self, dtype=dtype)

    def __len__(self) -> int:
        """Number of ids.

        Raises:
            GrowkitError: the file ends within one, or holds none.
        """
        size, item = self.path.stat().st_size - self.offset, np.dtype(self.dtype).itemsize
        if size % item:
            raise self.damaged(
                f"{size:,} bytes are no whole number of {np.dtype(self.dtype).name} ids",
                "" if self.kind != RAW else "Set token_dtype if it holds others.",
            )
        if size <= 0:
            raise self.damaged("it holds no tokens")
        return size // item

    def tokens(self) -> np.ndarray:
        """The ids ``[len(self)]``, memory-mapped."""
        return np.memmap(
            self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(len(self),)
        )

    def document_ends(self) -> np.ndarray:
        """Where documents end, in ids: int64, ascending, the last at ``len(self)``.

        Raises:
            GrowkitError: the index does not fit the ids.
        """
        if self.kind == MEGATRON:
            ends = self._megatron_ends()
        elif self.kind == DATATROVE:
            ends = self._integers(self.index, "<u8")
        else:
            header = self._integers(self.path, "<u4", self.offset // 4)
            if int(header[0]) != len(header) - 2 or int(header[1]) != self.offset:
                raise self.damaged("its offsets do not begin where its ids do")
            ends = (header[2:].astype(np.int64) - self.offset) // np.dtype(self.dtype).itemsize
        ends = ends.astype(np.int64)
        count = len(self)
        if (np.diff(ends, prepend=0) < 0).any():
            raise self.damaged("the documents of its index are not in ascending order")
        if len(ends) and int(ends[-1]) > count:
            raise self.damaged(
                f"its index ends at token {int(ends[-1]):,} and there are {count:,} tokens"
            )
        return np.unique(np.append(ends[ends > 0], count))

    def damaged(self, what: str, remedy: str = "") -> GrowkitError:
        """The error that says what is wrong with this file."""
        return _damaged(self.path, self.kind, what, remedy)

    def _integers(
        self, path: Path | None, dtype: str, count: int = -1, offset: int = 0
    ) -> np.ndarray:
        assert path is not None
        with open_regular(path, error=GrowkitError) as file:
            file.seek(offset)
            values = np.fromfile(file, dtype, count)
        if len(values) < count:
            raise self.damaged("its index is cut off")
        return values

    def _megatron_ends(self) -> np.ndarray:
        assert self.index is not None
        _, sequences, documents = _megatron_header(self.index)
        at = _MEGATRON_HEADER
        lengths = self._integers(self.index, "<i4", sequences, at).astype(np.int64)
        offsets = self._integers(self.index, "<i8", sequences, at + 4 * sequences)
        firsts = self._integers(self.index, "<i8", documents, at + 12 * sequences)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        if (lengths < 0).any() or (offsets != starts[:-1] * np.dtype(self.dtype).itemsize).any():
            raise self.damaged("the sequences of its index do not follow each other")
        if int(starts[-1]) != len(self):
            raise self.damaged(
                f"its index counts {int(starts[-1]):,} tokens and there are {len(self):,}"
            )
        if ((firsts < 0) | (firsts > sequences)).any():
            raise self.damaged("a document of its index is beyond the sequences")
        return starts[firsts]


def _damaged(path: Path, kind: str, what: str, remedy: str = "") -> GrowkitError:
    return GrowkitError(f"The token file {str(path)!r} ({kind}) is damaged: {what}.",
                        remedy or COPY_AGAIN)  # fmt: skip


def find_token_files(entries: Iterable[Path], dtype: str | None = None) -> list[TokenFile]:
    """The token files that the entries of a recipe stand for; each comes once.

    An entry is a file, a pattern, a prefix as Megatron-LM takes it (``X`` for ``X.bin`` and
    ``X.idx``), or a folder: of litdata, or with files of the other kinds at any depth.

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
        return _litdata(path)
    if path.suffix == ".ds":
        return [_datatrove(path)]
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
    index = path.with_suffix(".idx")
    if index.exists():
        return [TokenFile(path, MEGATRON, _megatron_header(index)[0], index=index)]
    return [_llm_c_or_raw(path)]


def _megatron_header(index: Path) -> tuple[str, int, int]:
    """(type of the ids, sequences, entries of the document index)."""
    with open_regular(index, error=GrowkitError) as file:
        head = file.read(_MEGATRON_HEADER)
    if not head.startswith(_MEGATRON_MAGIC):
        raise _damaged(index, MEGATRON, f"it begins with {shown(head[:9])}, not with 'MMIDIDX'")
    if len(head) < _MEGATRON_HEADER:
        raise _damaged(index, MEGATRON, "it is cut off")
    version, code, sequences, documents = struct.unpack("<QBQQ", head[len(_MEGATRON_MAGIC) :])
    if version != 1 or code not in _MEGATRON_TYPES:
        raise _damaged(
            index, MEGATRON, f"version {version} and type {code} are not 1 and one of integers"
        )
    size, wanted = index.stat().st_size, _MEGATRON_HEADER + 12 * sequences + 8 * documents
    if size < wanted:
        raise _damaged(
            index, MEGATRON, f"it has {size:,} bytes and {sequences:,} sequences need {wanted:,}"
        )
    return _MEGATRON_TYPES[code], sequences, documents


def _llm_c_or_raw(path: Path) -> TokenFile:
    with open_regular(path, error=GrowkitError) as file:
        head = file.read(_LLM_C_HEADER)
    magic, version, count = struct.unpack("<3i", head[:12].ljust(12, b"\0"))
    if (magic, version) == (_LLM_C_QUESTIONS, 1):
        raise UsageError(
            f"{str(path)!r} holds multiple-choice questions of llm.c, no text.",
            "Name the .bin files that its data scripts write for training.",
        )
    if magic not in {known for known, _ in _LLM_C}:
        return TokenFile(path, RAW)
    if (magic, version) not in _LLM_C:
        raise _damaged(path, LLM_C, f"its version is {version} for the magic number {magic}")
    file_ = TokenFile(path, LLM_C, _LLM_C[magic, version], offset=_LLM_C_HEADER)
    there = (path.stat().st_size - _LLM_C_HEADER) / np.dtype(file_.dtype).itemsize
    if there != count:
        raise _damaged(path, LLM_C, f"its header counts {count:,} tokens and there are {there:,g}")
    return file_


def _datatrove(path: Path) -> TokenFile:
    index = path.with_name(path.name + ".index")
    if not index.is_file():
        return TokenFile(path, DATATROVE)
    size, entries = path.stat().st_size, index.stat().st_size
    if entries == 0 or entries % 8:
        raise _damaged(index, DATATROVE, f"{entries:,} bytes are no list of 64-bit numbers")
    with open_regular(index, error=GrowkitError) as file:
        file.seek(entries - 8)
        (last,) = struct.unpack("<Q", file.read(8))
    if 2 * last > size:
        raise _damaged(
            path, DATATROVE, f"its index ends at token {last:,} and it has {size:,} bytes"
        )
    dtype = {2 * last: "<u2", 4 * last: "<u4"}.get(size, "")
    return TokenFile(path, DATATROVE, dtype, index=index)


def _litdata(folder: Path) -> list[TokenFile]:
    index = folder / "index.json"
    values = read_json_object(index)
    config, chunks = values.get("config"), values.get("chunks")
    if not isinstance(config, dict) or not isinstance(chunks, list):
        raise UsageError(
            f"{str(index)!r} is no index of litdata: it has no 'config' and 'chunks'.",
            f"Known kinds: {KINDS}.",
        )
    formats = config.get("data_format")
    name, _, code = str(formats[0] if isinstance(formats, list) and formats else "").partition(":")
    dtype = _LITDATA_TYPES.get(name, {}).get(int(code) if code.isdecimal() else -1)
    other = next((key for key in ("compression", "encryption") if config.get(key)), None)
    if dtype is None or other is not None or not isinstance(formats, list) or len(formats) != 1:
        what = f"{other} {json.dumps(config[other])}" if other else f"data_format {shown(formats)}"
        raise UsageError(
            f"{str(folder)!r} is a litdata folder with {what}, no plain token ids.",
            "Write it with item_loader=TokensLoader() and one 1-d integer tensor an item, "
            "uncompressed.",
        )
    found = []
    for chunk in chunks:
        fields = chunk if isinstance(chunk, dict) else {}
        file, items, size = (fields.get(key) for key in ("filename", "chunk_size", "chunk_bytes"))
        if not (isinstance(file, str) and isinstance(items, int) and isinstance(size, int)):
            raise _damaged(index, LITDATA, f"a chunk is {shown(chunk)}")
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise _damaged(index, LITDATA, f"its chunk {shown(file)} is not there")
        if path.stat().st_size != size:
            raise _damaged(
                path, LITDATA, f"it has {path.stat().st_size:,} bytes and its index says {size:,}"
            )
        found.append(TokenFile(path, LITDATA, dtype, offset=4 * (items + 2)))
    return found
