"""Which documents are held out: a function of their content alone.

A document is held out when the hash of its text is below ``eval_fraction`` of all hashes. So the
same text is on the same side wherever it stands: exact duplicates never straddle the split, not
across the sources of a mixture, and not across runs on other or more files, under any seed.

Few large text files cannot be shared out whole. In a source with fewer than ``2 / eval_fraction``
of them, the tail of each is held out instead, cut after a line break; the same text elsewhere is
cut at the same place (or left out, where it is a row that was not cut). A small source of rows
without any below the threshold holds out the one with the smallest hash.

With held-out files of their own nothing is held out of the training text, and training documents
that stand in them are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from growkit.core.errors import UsageError

# What a record of a source is: a document, or the head and the tail of a text file.
ROW, HEAD, TAIL = 0, 1, 2
# Where it goes.
TRAIN, HELD_OUT, DROPPED = 0, 1, 2
BLOCK = 1 << 20


def text_hash(text: str) -> int:
    """64 bits of a document's content."""
    data = text.encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def cut_tail(text: str, fraction: float) -> tuple[str, str]:
    """Split text into (head, tail); the tail is about ``fraction`` of it and starts a line."""
    cut = round(len(text) * (1 - fraction))
    line_end = text.rfind("\n", 0, cut)
    if line_end > len(text) // 2:
        cut = line_end + 1
    return text[:cut], text[cut:]


@dataclass(frozen=True)
class Records:
    """What a source is made of, in its order: uint64 hashes of whole documents, uint8 kinds.

    Both arrays are ``[records]``; head and tail of one text file carry the hash of the whole.
    """

    hashes: np.ndarray
    kinds: np.ndarray

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pieces that fit into memory when the arrays are memory-mapped."""
        for start in range(0, len(self.hashes), BLOCK):
            yield self.hashes[start : start + BLOCK], self.kinds[start : start + BLOCK]


@dataclass(frozen=True)
class Split:
    """The rule of one run: hashes below ``limit`` and in ``extra`` are held out.

    Args:
        cut: text files whose tail is held out.
        excluded: documents of separate held-out files.
    """

    limit: int
    extra: np.ndarray
    cut: np.ndarray
    excluded: np.ndarray

    def sides(self, hashes: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        """TRAIN, HELD_OUT or DROPPED for each record, uint8 ``[records]``."""
        held_out = (hashes < np.uint64(self.limit)) | np.isin(hashes, self.extra)
        sides = np.where(held_out, HELD_OUT, TRAIN).astype(np.uint8)
        if len(self.cut):
            cut = np.isin(hashes, self.cut)
            sides[cut] = np.array([DROPPED, TRAIN, HELD_OUT], np.uint8)[kinds[cut]]
        if len(self.excluded):
            sides[np.isin(hashes, self.excluded)] = DROPPED
        return sides


def decide(
    sources: Sequence[Records], fraction: float, excluded: np.ndarray | None = None
) -> Split:
    """The split of a run.

    Args:
        fraction: part of the documents to hold out; 0 for none.
        excluded: hashes of the documents in separate held-out files; then none are held out.

    Raises:
        UsageError: a source has a single document, which cannot be shared out.
    """
    none = np.empty(0, np.uint64)
    if excluded is not None:
        return Split(0, none, none, np.unique(excluded))
    if fraction == 0:
        return Split(0, none, none, none)
    limit = round(fraction * 2**64)
    cut = [_few_text_files(records, fraction) for records in sources]
    all_cut = np.unique(np.concatenate([none, *cut]))
    found = [
        _smallest(records, all_cut)
        for records in sources
        if not _holds_out(records, limit, all_cut)
    ]
    extra = [smallest for smallest in found if smallest is not None]
    return Split(limit, np.array(extra, np.uint64), all_cut, none)


def _few_text_files(records: Records, fraction: float) -> np.ndarray:
    """Hashes of the text files of a source that has too few of them to be held out whole."""
    found: np.ndarray = np.empty(0, np.uint64)
    for hashes, kinds in records.blocks():
        found = np.unique(np.concatenate([found, hashes[kinds == HEAD]]))
        if len(found) >= 2 / fraction:
            return np.empty(0, np.uint64)
    return found


def _holds_out(records: Records, limit: int, cut: np.ndarray) -> bool:
    split = Split(limit, cut[:0], cut, cut[:0])
    return any((split.sides(*block) == HELD_OUT).any() for block in records.blocks())


def _smallest(records: Records, cut: np.ndarray) -> int | None:
    """The smallest hash of a source's documents that are not cut; None without any."""
    ends: set[int] = set()
    for hashes, _ in records.blocks():
        free = hashes[~np.isin(hashes, cut)]
        if len(free):
            ends.update((int(free.min()), int(free.max())))
    if len(ends) == 1 and not len(cut):
        raise UsageError(
            "There is only one document (with its duplicates) to split off a held-out part.",
            "Give more text, data.eval_files, or data.eval_fraction: 0 for none.",
        )
    return min(ends, default=None)
