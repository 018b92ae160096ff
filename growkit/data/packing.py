"""Documents as long rows of tokens, cut into sequences of equal length.

Documents of a source follow each other, each ended by the end-of-text token, and sequence i is
tokens ``[i * length, (i + 1) * length)`` of that row. ``document_attention`` says what a sequence
with several documents is to the model:

* ``joined``: one text (ordinary packing).
* ``separate``: every document by itself. Positions restart at each document, and no attention mask
  is passed: transformers builds the block-diagonal causal mask from the positions alone (an
  all-ones mask would switch that off, silently). The first token of a document is not a target.
  :mod:`growkit.training.document_check` refuses a model whose attention does not follow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from growkit.core.errors import UsageError
from growkit.core.progress import Reporter
from growkit.data.held_out import DROPPED, HELD_OUT, TRAIN, Records, decide
from growkit.data.order import SourcePlace
from growkit.data.recipe import DataSection
from growkit.data.sources import Corpus, Source
from growkit.data.token_cache import Shard, tokenize_source
from growkit.data.token_files import token_shards
from growkit.data.token_stream import TokenStream, one_side
from growkit.data.tokenize_pool import TokenizerPool, available_cores

IGNORED = -100


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """The sequences of several sources, one source after the other; shorter rests are left out.

    An item holds ``input_ids`` and ``labels``, both int64 ``[length]``; the model shifts labels.
    With ``separate`` documents also ``position_ids``, and labels are -100 where a document starts.
    Of conversations, labels are -100 but for what the assistant says (:mod:`growkit.data.chat`).

    Args:
        streams: the sources, or a single array of tokens.
    """

    def __init__(
        self, streams: Sequence[TokenStream] | np.ndarray, length: int, *, separate: bool = False
    ) -> None:
        if isinstance(streams, np.ndarray):
            streams = [stream_of(streams)]
        self.streams, self.length, self.separate = list(streams), length, separate
        # int64 [sources]: sequences of each source
        self.sizes = [len(stream) // length for stream in self.streams]
        self._ends = np.cumsum(self.sizes)
        # Where the sources stood at the sample ``begin`` of the run, see growkit.data.order.
        self.places: list[SourcePlace] | None = None
        self.begin = 0

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        stream = self.streams[number]
        start = (index - (int(self._ends[number - 1]) if number else 0)) * self.length
        ids = torch.from_numpy(stream.tokens(start, start + self.length))
        item = {"input_ids": ids, "labels": ids.clone()}
        if stream.has_targets:
            item["labels"][torch.from_numpy(~stream.targets(start, start + self.length))] = IGNORED
        if self.separate:
            starts = stream.document_starts(start, start + self.length)
            sizes = np.diff(np.append(starts, self.length))
            positions = np.arange(self.length) - np.repeat(starts, sizes)
            item["position_ids"] = torch.from_numpy(positions)
            item["labels"][torch.from_numpy(starts)] = IGNORED
        return item

    def parts(self) -> dict[str, range]:
        """The indices of each source's sequences, by its name."""
        ends = self._ends.tolist()
        return {
            stream.name: range(end - size, end)
            for stream, size, end in zip(self.streams, self.sizes, ends, strict=True)
        }

    @property
    def predicted_tokens(self) -> int:
        """Tokens that a loss over all sequences is the mean over: the first of one is none."""
        total = 0
        for stream, size in zip(self.streams, self.sizes, strict=True):
            if stream.has_targets:
                here = stream.targets(0, size * self.length).reshape(size, self.length)
                total += int(here[:, 1:].sum())
            else:
                total += size * (self.length - 1)
        return total

    @property
    def bytes_per_token(self) -> float | None:
        """Average UTF-8 bytes of a token, each source weighed by its sequences.

        None when that is not known of a source: token files do not say.
        """
        parts = [
            (size, stream.utf8_bytes / len(stream))
            for size, stream in zip(self.sizes, self.streams, strict=True)
            if size
        ]
        if not parts or not all(ratio for _, ratio in parts):
            return None
        return sum(size * ratio for size, ratio in parts) / sum(size for size, _ in parts)


def stream_of(tokens: np.ndarray, ends: Sequence[int] = (), name: str = "data") -> TokenStream:
    """An array of tokens as a stream; ``ends`` says where its documents end."""
    limits = np.array(ends or [len(tokens)], np.uint64)
    none = np.zeros(len(limits), np.uint64)
    shard = Shard(None, tokens, limits, none, Records(none, none.astype(np.uint8)), {})
    one = np.zeros(1, np.int64)
    return TokenStream(name, [shard], one, one, np.array([len(tokens)], np.int64), len(limits))


@dataclass(frozen=True)
class PackedText:
    """The tokenized sources of a run, split.

    Args:
        key: a hash of all that decides the tokens of the run and their split.
        dropped: training documents that were left out because they are held out elsewhere.
    """

    train: list[TokenStream]
    eval: list[TokenStream]
    key: str
    dropped: int = 0


def pack(
    corpus: Corpus,
    tokenizer: Any,
    fingerprint: str,
    cache: Path,
    reporter: Reporter,
    *,
    workers: int | None = None,
    vocabulary: int | None = None,
) -> PackedText:
    """Tokenize a corpus into the cache, or take what is there, and split it.

    Args:
        fingerprint: hash of the tokenizer's files (part of the cache's keys).
        workers: tokenizing processes; default: one per core.
        vocabulary: of the model, which the ids of token files are below; default: the tokenizer's.
    """
    with TokenizerPool(tokenizer, workers or available_cores()) as pool:

        def shards_of(source: Source, tail: float) -> list[Shard]:
            if source.tokens:
                ids = vocabulary or len(tokenizer)
                return token_shards(source, tokenizer, ids, cache, reporter, tail=tail)
            return tokenize_source(source, tokenizer, fingerprint, cache, reporter, pool, tail=tail)

        sources = [shards_of(source, corpus.tail) for source in corpus.sources]
        held_out = shards_of(corpus.held_out, 0) if corpus.held_out is not None else None
    records = [joined_records(shards) for shards in sources]
    excluded = joined_records(held_out).hashes if held_out is not None else None
    split = decide(records, corpus.eval_fraction, excluded)
    names = [source.name for source in corpus.sources]
    named = list(zip(names, sources, strict=True))
    train = [one_side(name, shards, split, TRAIN) for name, shards in named]
    if held_out is not None:
        nothing_excluded = decide([], 0)
        evaluation = [one_side("held-out", held_out, nothing_excluded, TRAIN)]
    else:
        evaluation = [one_side(name, shards, split, HELD_OUT) for name, shards in named]
    dropped = sum(one_side(name, shards, split, DROPPED).documents for name, shards in named)
    if dropped:
        reporter.warn(
            f"{dropped:,} documents of the training text are held out elsewhere: left out"
        )
    keys = [[shard.meta["content"] for shard in shards] for shards in (*sources, held_out or [])]
    values = json.dumps([keys, fingerprint, corpus.eval_fraction, held_out is not None])
    key = hashlib.blake2b(values.encode(), digest_size=12).hexdigest()
    return PackedText(train, evaluation, key, dropped)


def joined_records(shards: Sequence[Shard]) -> Records:
    """The records of all shards of a source."""
    if len(shards) == 1:
        return shards[0].records
    hashes = [np.empty(0, np.uint64), *(shard.records.hashes for shard in shards)]
    kinds = [np.empty(0, np.uint8), *(shard.records.kinds for shard in shards)]
    return Records(np.concatenate(hashes), np.concatenate(kinds))


def datasets(
    packed: PackedText, section: DataSection
) -> tuple[PackedDataset, PackedDataset | None]:
    """Training and held-out sequences; None when nothing is held out.

    Raises:
        UsageError: a source has less text than one sequence.
    """
    length, separate = section.sequence_length, section.document_attention == "separate"
    train = PackedDataset(packed.train, length, separate=separate)
    for stream in train.streams:
        if stream.has_targets and not any(shard.meta["targets"] for shard in stream.shards):
            raise _no_targets("training", stream, train)
    for stream, size in zip(train.streams, train.sizes, strict=True):
        if size == 0:
            raise UsageError(
                f"The training text{_of(stream, train)} has {len(stream)} tokens, fewer than one "
                f"sequence of {length}.",
                "Give more text or a smaller data.sequence_length.",
            )
    if section.eval_fraction == 0 and not section.holds_out_files:
        return train, None
    limit = section.max_eval_tokens
    if limit is not None:
        limit //= len(packed.eval)
    held_out = PackedDataset(
        [first_tokens(stream, limit) for stream in packed.eval], length, separate=separate
    )
    for stream, size in zip(held_out.streams, held_out.sizes, strict=True):
        if size == 0:
            raise UsageError(
                f"The held-out text{_of(stream, held_out)} has {len(stream)} tokens, fewer than "
                f"one sequence of {length}.",
                "Raise data.eval_fraction or data.max_eval_tokens, give data.eval_files, or set "
                "data.eval_fraction: 0 for no evaluation.",
            )
    if held_out.predicted_tokens == 0:
        raise _no_targets("held-out", held_out.streams[0], held_out)
    return train, held_out


def _no_targets(what: str, stream: TokenStream, dataset: PackedDataset) -> UsageError:
    return UsageError(
        f"The {what} conversations{_of(stream, dataset)} have no turn of the assistant.",
        "The loss is on the tokens of messages with the role assistant: give some, or a chat "
        "template that marks them by {% generation %}.",
    )


def _of(stream: TokenStream, dataset: PackedDataset) -> str:
    return f" of {stream.name!r}" if len(dataset.streams) > 1 else ""


def first_tokens(stream: TokenStream, limit: int | None) -> TokenStream:
    """The beginning of a stream; its documents and bytes stay those of the whole."""
    if limit is None or limit >= len(stream):
        return stream
    number = int(np.searchsorted(stream.ends, limit))
    ends = np.append(stream.ends[:number], limit)
    utf8_bytes = round(stream.utf8_bytes * limit / len(stream))
    return TokenStream(
        stream.name, stream.shards, stream.shard_of[: number + 1], stream.first[: number + 1],
        ends, stream.documents, utf8_bytes,
    )  # fmt: skip
