"""Where the text of a run comes from: sources of files, datasets, token files or one text.

Sources are cut into shards. A shard is what is tokenized and cached as a whole: consecutive files
of a source until they come to 64 MiB, one dataset, or one text. Its key is a hash of its content
(of files: their bytes), so that a file that is added, changed or renamed costs the tokenizing of
its own shard at most. A token file is a shard by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from growkit.core.errors import CheckpointError, UsageError
from growkit.core.json_files import read_json_object
from growkit.data import hub_dataset
from growkit.data.held_out import (
    HEAD,
    HELD_OUT,
    ROW,
    TAIL,
    TRAIN,
    Records,
    cut_tail,
    decide,
    text_hash,
)
from growkit.data.recipe import DataSection, DatasetSection
from growkit.data.remote_files import content_of, is_remote, size_of
from growkit.data.text_files import find_files, kind_of, read_documents
from growkit.data.token_folders import find_token_files
from growkit.data.token_formats import TokenFile
from growkit.samples import sample_text

SHARD_BYTES = 64 << 20


class Record(NamedTuple):
    """A document, or the head or tail of a text file; ``hash`` is of the whole document."""

    text: str
    hash: int
    kind: int


@dataclass(frozen=True)
class Source:
    """One source; exactly one of ``files``, ``dataset``, ``tokens`` and ``text`` is set."""

    name: str = "data"
    files: list[Path] = field(default_factory=list)
    dataset: DatasetSection | None = None
    tokens: list[TokenFile] = field(default_factory=list)
    text: str | None = None
    text_field: str = "text"
    messages_field: str | None = None

    def shards(self) -> list[Source]:
        """The parts that are cached by themselves, in order."""
        if not self.files:
            return [self]
        groups: list[list[Path]] = [[]]
        size = 0
        for path in self.files:
            if size >= SHARD_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(path)
            size += size_of(path)
        return [replace(self, files=group) for group in groups]

    @property
    def has_text_files(self) -> bool:
        """Whether there are documents that may have to be cut."""
        return self.text is not None or any(kind_of(path) == ".txt" for path in self.files)

    @property
    def size(self) -> int:
        """Bytes to read, 0 when that is not known beforehand."""
        if self.text is not None:
            return len(self.text)
        return sum(map(size_of, self.paths))

    @property
    def paths(self) -> list[Path]:
        """The files that are named, of text or tokens."""
        return [*self.files, *(path for file in self.tokens for path in file.files)]

    def content(self, memo: Path | None = None) -> str:
        """A hash of what is read; of a Hub dataset: of what is asked for."""
        digest = hashlib.blake2b(digest_size=16)
        fields = ["messages", self.messages_field] if self.messages_field else [self.text_field]
        digest.update(json.dumps(fields).encode())
        if self.text is not None:
            digest.update(self.text.encode())
        files = self.files
        if self.dataset is not None:
            digest.update(self.dataset.model_dump_json().encode())
            files = hub_dataset.local_files(self.dataset)
        for path, content in zip(files, file_hashes(files, memo), strict=True):
            digest.update(f"{kind_of(path)}{content}".encode())
        for file in self.tokens:
            facts = [file_hashes(file.files, memo), file.kind, file.dtype, file.offset]
            digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    def records(self, tail: float, commit: str | None = None) -> Iterator[Record]:
        """The documents in order; text files in two parts when ``tail`` is not 0.

        Raises:
            UsageError: there is no text, only tokens.
        """
        if self.tokens:
            raise UsageError(
                f"{str(self.tokens[0].path)!r} holds token ids, and text is needed here.",
                "A tokenizer is trained and attention is measured on text; use the tokenizer that "
                "made the ids.",
            )
        if self.text is not None:
            yield from _parts(self.text, tail)
        if self.dataset is not None:
            rows = hub_dataset.read_rows(self.dataset, self.text_field, commit, self.messages_field)
            for text in rows:
                yield Record(text, text_hash(text), ROW)
        for path in self.files:
            for text in read_documents(path, self.text_field, self.messages_field):
                if kind_of(path) == ".txt":
                    yield from _parts(text, tail)
                else:
                    yield Record(text, text_hash(text), ROW)


def _parts(text: str, tail: float) -> Iterator[Record]:
    whole = text_hash(text)
    if tail == 0:
        yield Record(text, whole, ROW)
        return
    for kind, part in zip((HEAD, TAIL), cut_tail(text, tail), strict=True):
        if part:
            yield Record(part, whole, kind)


def file_hashes(files: Sequence[Path], memo: Path | None = None) -> list[str]:
    """Hashes of the files' bytes.

    Args:
        memo: a JSON file in which hashes are remembered by path, size and time of change, so that
            a resumed run need not read a large corpus again. A file that changed within the last
            seconds is not remembered: it could change again within the clock's resolution.
    """
    known: dict[str, str] = {}
    if memo is not None and memo.is_file():
        with suppress(CheckpointError):  # what is not known is read again
            known = {k: v for k, v in read_json_object(memo).items() if isinstance(v, str)}
    hashes, fresh = [], {}
    for path in files:
        if is_remote(path):
            hashes.append(content_of(path))
            continue
        stat = path.stat()
        key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        value = known.get(key)
        if value is None:
            content = hashlib.blake2b(digest_size=16)
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    content.update(block)
            value = content.hexdigest()
            if time.time() - stat.st_mtime > 5:
                fresh[key] = value
        hashes.append(value)
    if memo is not None and fresh:
        with suppress(PermissionError):  # a cache that others made may be read-only
            memo.parent.mkdir(parents=True, exist_ok=True)
            partial = memo.with_name(f"{memo.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps(known | fresh))
            os.replace(partial, memo)
    return hashes


@dataclass(frozen=True)
class Corpus:
    """The sources of a run and what is held out; documents are read again at every iteration.

    Args:
        held_out: separate held-out files; then nothing is held out of the sources.
    """

    sources: list[Source]
    eval_fraction: float = 0.05
    held_out: Source | None = None

    def __post_init__(self) -> None:
        if self.held_out is None:
            return
        own = {path.resolve() for path in self.held_out.paths}
        for source in self.sources:
            both = own & {path.resolve() for path in source.paths}
            if both:
                kind = "tokens" if source.tokens else "files"
                raise UsageError(
                    f"{str(min(both))!r} is in data.{kind} and in data.eval_{kind}.",
                    "Held-out text must not be trained on: leave it out of one of them.",
                )

    @property
    def tail(self) -> float:
        """The part of a text file that may have to be held out."""
        return 0.0 if self.held_out is not None else self.eval_fraction

    def train_documents(self) -> Iterator[str]:
        """The documents to train on, for a tokenizer that is trained on them."""
        return self._documents(TRAIN)

    def eval_documents(self) -> Iterator[str]:
        """The held-out documents."""
        if self.held_out is not None:
            return (record.text for record in self.held_out.records(0))
        return self._documents(HELD_OUT)

    def _documents(self, side: int) -> Iterator[str]:
        excluded = None
        if self.held_out is not None:
            hashes = [record.hash for record in self.held_out.records(0)]
            excluded = np.array(hashes, np.uint64)
        split = decide([self._records(s) for s in self.sources], self.eval_fraction, excluded)
        for source in self.sources:
            for record in self._bounded(source):
                one = np.array([record.hash], np.uint64), np.array([record.kind], np.uint8)
                if split.sides(*one)[0] == side:
                    yield record.text

    def _bounded(self, source: Source) -> Iterator[Record]:
        """A stream has no end: without a tokenizer, a token is taken to be four bytes."""
        limit = source.dataset.max_tokens if source.dataset else None
        size = 0
        for record in source.records(self.tail):
            yield record
            size += len(record.text.encode())
            if limit is not None and size >= 4 * limit:
                return

    def _records(self, source: Source) -> Records:
        pairs = [(record.hash, record.kind) for record in self._bounded(source)]
        return Records(
            np.array([pair[0] for pair in pairs], np.uint64),
            np.array([pair[1] for pair in pairs], np.uint8),
        )


def corpus_of(section: DataSection) -> Corpus:
    """The corpus that a data section names; its files are looked for now.

    Raises:
        UsageError: a file is missing or of an unknown kind, or a library is.
        GrowkitError: a token file is damaged.
    """
    sources = []
    for entry in section.sources:
        if entry.dataset is not None:
            hub_dataset.check_installed()
        named = entry.files if isinstance(entry.files, list) else []
        sources.append(
            Source(
                name=entry.name,
                files=find_files(named),
                dataset=entry.dataset,
                tokens=find_token_files(
                    entry.tokens or [], entry.token_dtype or section.token_dtype
                ),
                text=sample_text() if entry.files == "sample" else None,
                text_field=entry.text_field or section.text_field,
                messages_field=section.messages_field_of(entry),
            )
        )
    held_out = None
    if section.eval_files:
        files = find_files(section.eval_files)
        held_out = Source(
            "held-out",
            files=files,
            text_field=section.text_field,
            messages_field=section.messages_field,
        )
    elif section.eval_tokens:
        tokens = find_token_files(section.eval_tokens, section.token_dtype)
        held_out = Source("held-out", tokens=tokens)
    return Corpus(sources, section.eval_fraction, held_out)
