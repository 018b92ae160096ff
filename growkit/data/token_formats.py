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
=============  ===================================================================================

All numbers are little-endian. Where nothing says where documents end, the end-of-text token does.
Folders with an index are in :mod:`growkit.data.token_folders`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from growkit.core.errors import GrowkitError, UsageError, shown
from growkit.core.files import COPY_AGAIN, open_regular

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER = 34
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LLM_C = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
_LLM_C_HEADER, _LLM_C_QUESTIONS = 1024, 20240522


@dataclass(frozen=True)
class TokenFile:
    """A file with a flat run of token ids and nothing else, as nanoGPT writes it.

    Attributes:
        dtype: of the ids; empty where the file does not say (see :meth:`as_type`).
        offset: bytes before the first id.
        index: the file that says where documents end; None: the ids' own file, or nothing does.
        kind: which tool's.
        mapped: the ids can be memory-mapped; else they are copied into the token cache.
    """

    path: Path
    dtype: str = ""
    offset: int = 0
    index: Path | None = None
    kind: ClassVar[str] = "nanoGPT"
    mapped: ClassVar[bool] = True

    @property
    def files(self) -> list[Path]:
        """All that is read."""
        return [self.path, *([self.index] if self.index is not None else [])]

    @property
    def untyped(self) -> bool:
        """Whether the format leaves the type of the ids to its reader."""
        return type(self) is TokenFile

    def as_type(self, vocabulary: int) -> TokenFile:
        """With a type: uint16 when ``vocabulary`` ids fit into it, else uint32."""
        dtype = self.dtype or ("<u2" if vocabulary <= 1 << 16 else "<u4")
        return replace(self, dtype=dtype)

    @property
    def _item(self) -> int:
        return np.dtype(self.dtype).itemsize

    def __len__(self) -> int:
        """Number of ids.

        Raises:
            GrowkitError: the file ends within one, or holds none.
        """
        size = self.path.stat().st_size - self.offset
        if size % self._item:
            raise self.damaged(
                f"{size:,} bytes are no whole number of {np.dtype(self.dtype).name} ids",
                "Set token_dtype if it holds others." if self.untyped else "",
            )
        if size <= 0:
            raise self.damaged("it holds no tokens")
        return size // self._item

    def tokens(self) -> np.ndarray:
        """The ids ``[len(self)]``, memory-mapped where that can be."""
        return np.memmap(
            self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(len(self),)
        )

    def document_ends(self) -> np.ndarray | None:
        """Where documents end, in ids: int64, ascending, the last at ``len(self)``.

        None: at the end-of-text tokens.

        Raises:
            GrowkitError: the index does not fit the ids.
        """
        return None

    def damaged(self, what: str, remedy: str = "") -> GrowkitError:
        """The error that says what is wrong with this file."""
        return damaged(self.path, self.kind, what, remedy)

    def checked_ends(self, ends: np.ndarray) -> np.ndarray:
        """Ends from an index, without empty documents; a rest is a document too."""
        ends, count = ends.astype(np.int64), len(self)
        if (np.diff(ends, prepend=0) < 0).any():
            raise self.damaged("the documents of its index are not in ascending order")
        if len(ends) and int(ends[-1]) > count:
            raise self.damaged(
                f"its index ends at token {int(ends[-1]):,} and there are {count:,} tokens"
            )
        return np.unique(np.append(ends[ends > 0], count))

    def integers(self, path: Path, dtype: str, count: int = -1, offset: int = 0) -> np.ndarray:
        """Numbers of an index.

        Raises:
            GrowkitError: there are fewer than ``count``.
        """
        if offset + max(count, 0) * np.dtype(dtype).itemsize > path.stat().st_size:
            raise self.damaged("its index is cut off")
        with open_regular(path, error=GrowkitError) as file:
            file.seek(offset)
            return np.fromfile(file, dtype, count)


class LlmcFile(TokenFile):
    """Ids behind a header that says their type."""

    kind = "llm.c"


class DatatroveFile(TokenFile):
    """Ids with an index of document ends beside them, or without."""

    kind = "datatrove"

    def document_ends(self) -> np.ndarray | None:
        """See :class:`TokenFile`."""
        return None if self.index is None else self.checked_ends(self.integers(self.index, "<u8"))


class MegatronFile(TokenFile):
    """Ids with an index of sequences and documents."""

    kind = "Megatron-LM"

    def document_ends(self) -> np.ndarray | None:
        """See :class:`TokenFile`."""
        assert self.index is not None
        _, sequences, documents = _megatron_header(self.index)
        at = _MEGATRON_HEADER
        lengths = self.integers(self.index, "<i4", sequences, at).astype(np.int64)
        offsets = self.integers(self.index, "<i8", sequences, at + 4 * sequences)
        firsts = self.integers(self.index, "<i8", documents, at + 12 * sequences)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        if (lengths < 0).any() or (offsets != starts[:-1] * self._item).any():
            raise self.damaged("the sequences of its index do not follow each other")
        if int(starts[-1]) != len(self):
            raise self.damaged(
                f"its index counts {int(starts[-1]):,} tokens and there are {len(self):,}"
            )
        if ((firsts < 0) | (firsts > sequences)).any():
            raise self.damaged("a document of its index is beyond the sequences")
        return self.checked_ends(starts[firsts])


def damaged(path: Path, kind: str, what: str, remedy: str = "") -> GrowkitError:
    """The error that says what is wrong with a token file."""
    return GrowkitError(
        f"The token file {str(path)!r} ({kind}) is damaged: {what}.", remedy or COPY_AGAIN
    )


def open_bin(path: Path) -> TokenFile:
    """A ``.bin`` file of Megatron-LM (with its index), llm.c (with its header) or nanoGPT.

    Raises:
        GrowkitError: index or header are damaged.
    """
    index = path.with_suffix(".idx")
    if index.exists():
        return MegatronFile(path, _megatron_header(index)[0], index=index)
    with open_regular(path, error=GrowkitError) as file:
        head = file.read(12)
    magic, version, count = struct.unpack("<3i", head.ljust(12, b"\0"))
    if (magic, version) == (_LLM_C_QUESTIONS, 1):
        raise UsageError(
            f"{str(path)!r} holds multiple-choice questions of llm.c, no text.",
            "Name the .bin files that its data scripts write for training.",
        )
    if magic not in {known for known, _ in _LLM_C}:
        return TokenFile(path)
    if (magic, version) not in _LLM_C:
        raise damaged(path, LlmcFile.kind, f"its version is {version} for the magic number {magic}")
    found = LlmcFile(path, _LLM_C[magic, version], offset=_LLM_C_HEADER)
    there = (path.stat().st_size - _LLM_C_HEADER) / np.dtype(found.dtype).itemsize
    if there != count:
        raise found.damaged(f"its header counts {count:,} tokens and there are {there:,.12g}")
    return found


def _megatron_header(index: Path) -> tuple[str, int, int]:
    """(type of the ids, sequences, entries of the document index)."""

    def wrong(what: str) -> GrowkitError:
        return damaged(index, MegatronFile.kind, what)

    with open_regular(index, error=GrowkitError) as file:
        head = file.read(_MEGATRON_HEADER)
    if not head.startswith(_MEGATRON_MAGIC):
        raise wrong(f"it begins with {shown(head[:9])}, not with 'MMIDIDX'")
    if len(head) < _MEGATRON_HEADER:
        raise wrong("it is cut off")
    version, code, sequences, documents = struct.unpack("<QBQQ", head[len(_MEGATRON_MAGIC) :])
    if version != 1 or code not in _MEGATRON_TYPES:
        raise wrong(f"version {version} and type {code} are not 1 and one of integers")
    size, wanted = index.stat().st_size, _MEGATRON_HEADER + 12 * sequences + 8 * documents
    if size < wanted:
        raise wrong(f"it has {size:,} bytes and {sequences:,} sequences need {wanted:,}")
    return _MEGATRON_TYPES[code], sequences, documents


def open_ds(path: Path) -> TokenFile:
    """A ``.ds`` file of datatrove; the type of its ids is known from its index.

    Raises:
        GrowkitError: the index does not fit.
    """
    index = path.with_name(path.name + ".index")
    if not index.is_file():
        return DatatroveFile(path)
    size, entries = path.stat().st_size, index.stat().st_size
    if entries == 0 or entries % 8:
        raise damaged(index, DatatroveFile.kind, f"{entries:,} bytes are no list of 64-bit numbers")
    with open_regular(index, error=GrowkitError) as file:
        file.seek(entries - 8)
        (last,) = struct.unpack("<Q", file.read(8))
    if 2 * last > size:
        raise damaged(
            path,
            DatatroveFile.kind,
            f"its index ends at token {last:,} and it has {size:,} bytes",
        )
    dtype = {2 * last: "<u2", 4 * last: "<u4"}.get(size, "")
    return DatatroveFile(path, dtype, index=index)
