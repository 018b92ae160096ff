"""The documents of a source that are on one side of the split, as one long row of tokens.

Nothing is copied: the row is made of segments of the memory-mapped shards, one for every run of
documents that follow each other. Any part of it is found by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from growkit.data.held_out import BLOCK, HEAD, Split
from growkit.data.token_cache import Shard


@dataclass(frozen=True)
class TokenStream:
    """Tokens ``[0, len)`` of one side of a source.

    Args:
        name: of the source.
        shard_of: int64 ``[segments]``, the shard of each segment.
        first: int64 ``[segments]``, its first token there.
        ends: int64 ``[segments]``, where it ends in this stream.
        documents, utf8_bytes: how many documents, and their length in UTF-8.
    """

    name: str
    shards: Sequence[Shard]
    shard_of: np.ndarray
    first: np.ndarray
    ends: np.ndarray
    documents: int = 0
    utf8_bytes: int = 0

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def segments(self, start: int, stop: int) -> list[tuple[Shard, int, int]]:
        """(shard, first token, end) of the pieces that make up ``[start, stop)``."""
        found = []
        number = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            end = int(self.ends[number])
            begin = int(self.ends[number - 1]) if number else 0
            shard = self.shards[int(self.shard_of[number])]
            offset = int(self.first[number]) - begin
            found.append((shard, start + offset, min(end, stop) + offset))
            start, number = min(end, stop), number + 1
        return found

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids ``[stop - start]``, int64."""
        pieces = [shard.tokens[a:b] for shard, a, b in self.segments(start, stop)]
        return np.concatenate([np.empty(0, np.int64), *pieces], dtype=np.int64)

    @property
    def has_targets(self) -> bool:
        """Whether only some of the tokens are targets of the loss: those of conversations."""
        return any(shard.targets is not None for shard in self.shards)

    def targets(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens ``[start, stop)`` are targets of the loss, bool."""
        pieces = [
            np.ones(b - a, bool) if shard.targets is None else shard.targets[a:b].astype(bool)
            for shard, a, b in self.segments(start, stop)
        ]
        return np.concatenate([np.empty(0, bool), *pieces])

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin in ``[start, stop)``, relative to ``start``, int64, ascending.

        The first is 0: what stands at ``start`` begins there as far as this part is concerned.
        """
        starts, done = [np.zeros(1, np.int64)], 0
        for shard, a, b in self.segments(start, stop):
            low, high = np.searchsorted(shard.ends, np.array([a, b], np.uint64))
            inside = np.asarray(shard.ends[low:high], np.int64)
            # The head of a text file continues in its tail.
            closed = inside[np.asarray(shard.records.kinds[low:high]) != HEAD]
            starts += [np.array([done]), closed - a + done]
            done += b - a
        found = np.unique(np.concatenate(starts))
        return found[found < stop - start]


def one_side(name: str, shards: Sequence[Shard], split: Split, side: int) -> TokenStream:
    """The stream of the records that the split puts on one side."""
    none = np.empty(0, np.int64)
    shard_of, first, lengths = [none], [none], [none]
    documents = utf8_bytes = 0
    for number, shard in enumerate(shards):
        at = 0
        for block, (hashes, kinds) in enumerate(shard.records.blocks()):
            here = slice(block * BLOCK, block * BLOCK + len(hashes))
            ends = np.asarray(shard.ends[here], np.int64)
            starts = np.concatenate([[at], ends[:-1]])
            at = int(ends[-1])
            kept = split.sides(hashes, kinds) == side
            documents += int(kept.sum())
            utf8_bytes += int(shard.bytes[here][kept].sum())
            edges = np.flatnonzero(np.diff(kept, prepend=False, append=False))
            low, high = edges[::2], edges[1::2]
            shard_of.append(np.full(len(low), number, np.int64))
            first.append(starts[low])
            lengths.append(ends[high - 1] - starts[low])
    return TokenStream(
        name,
        shards,
        np.concatenate(shard_of),
        np.concatenate(first),
        np.cumsum(np.concatenate(lengths)),
        documents,
        utf8_bytes,
    )
