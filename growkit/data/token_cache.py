"""The token cache: every shard is tokenized once, into memory-mapped files.

Layout, one folder a shard, named by the hash of its content, the tokenizer and the settings::

    tokens.bin     uint16, or uint32 for more than 65 536 tokens; each document ended by the
                   end-of-text token
    ends.bin       uint64 [records]: where each record ends, in tokens
    hashes.bin     uint64 [records]: of the content of each document (see growkit.data.held_out)
    bytes.bin      uint64 [records]: its length in UTF-8
    kinds.bin      uint8 [records]: a document, or the head or tail of a text file
    targets.bin    uint8 [tokens], of conversations alone: 1 where a token is a target of the loss
    meta.json      counts; written last

A shard is written under ``KEY.partial`` and renamed; whoever is killed leaves nothing else behind,
which the next run removes, and shards that were finished stay. A file lock lets several processes
of one run share the work: one tokenizes, the others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from pydantic import Field

from growkit.checkpoint.staging import sync_tree
from growkit.core import records as core_records
from growkit.core.errors import CheckpointError
from growkit.core.progress import Progress, Reporter
from growkit.core.writing import write_file
from growkit.data import hub_dataset
from growkit.data.chat import ChatEncoder
from growkit.data.held_out import HEAD, Records
from growkit.data.sources import Record, Source
from growkit.data.tokenize_pool import TokenizerPool

FORMAT = 3  # 2: a byte order mark was text, and a text file one document however large
FILES = ("tokens", "ends", "hashes", "bytes", "kinds")
TARGETS = "targets"
# Longer documents are tokenized in pieces cut after a line break, to bound memory and to share
# them among the workers. A part of the format: a seam may change tokens.
PIECE = 1 << 20
BATCH = 1 << 20
# Below this the start of worker processes costs more than it saves.
PARALLEL_FROM = 16 << 20


class ShardMeta(core_records.Record):
    """``meta.json`` of a shard of the token cache."""

    format: int
    dtype: Literal["<u2", "<u4"]
    tokens: int = Field(ge=0)
    records: int = Field(ge=0)
    commit: str | None = None
    content: str
    targets: int | None = Field(default=None, ge=0)  # of conversations: tokens with a loss


@dataclass(frozen=True)
class Shard:
    """A tokenized shard; arrays are memory-mapped and in the order of the source.

    A copy for a data-loading process maps the files again (a pickled map would be its content).
    """

    folder: Path | None
    tokens: np.ndarray
    ends: np.ndarray
    bytes: np.ndarray
    records: Records
    meta: dict[str, Any]
    targets: np.ndarray | None = field(default=None, kw_only=True)

    def __reduce__(self) -> Any:
        if self.folder is not None:
            return open_shard, (self.folder,)
        return Shard, (None, self.tokens, self.ends, self.bytes, self.records, self.meta)


def tokenize_source(
    source: Source,
    tokenizer: Any,
    fingerprint: str,
    cache: Path,
    reporter: Reporter,
    pool: TokenizerPool,
    *,
    tail: float,
) -> list[Shard]:
    """The shards of a source, from the cache or tokenized now.

    Args:
        fingerprint: hash of the tokenizer's files.
        tail: the part of each text file that may have to be held out.
    """
    cache.mkdir(parents=True, exist_ok=True)
    parts = source.shards()
    chat = ChatEncoder(tokenizer) if source.messages_field is not None else None
    folders = [_folder(part, fingerprint, cache, tail, chat) for part in parts]
    missing = [part for part, folder in zip(parts, folders, strict=True) if not _whole(folder)]
    if missing:
        remove_leftovers(cache)
        total, unit = sum(part.size for part in missing), "B"
        if source.dataset is not None:
            total, unit = source.dataset.max_tokens or 0, "tokens"
        label = f"tokenizing {source.name}"
        reporter.log(label)
        with reporter.progress(label, total or None, unit=unit) as bar:
            for part, folder in zip(parts, folders, strict=True):
                with FileLock(folder.with_name(folder.name + ".lock")):
                    if not _whole(folder):
                        with whole_folder(folder) as partial:
                            _fill(part, partial, tokenizer, pool, bar, tail, reporter, chat)
    return [open_shard(folder) for folder in folders]


def remove_leftovers(cache: Path) -> None:
    """Remove what runs that were killed have left unfinished; what a live run writes is locked."""
    for partial in cache.glob("*.partial"):
        with suppress(OSError, Timeout):
            if not partial.is_dir():  # file-hashes.json.PID.partial, which takes moments to write
                if time.time() - partial.stat().st_mtime > 600:
                    partial.unlink()
                continue
            with FileLock(partial.with_suffix(".lock"), timeout=0):
                shutil.rmtree(partial)


def _folder(
    source: Source, fingerprint: str, cache: Path, tail: float, chat: ChatEncoder | None
) -> Path:
    cut = tail if source.has_text_files else 0.0
    content = source.content(cache / "file-hashes.json")
    values = [FORMAT, PIECE, content, fingerprint, cut]
    if chat is not None:
        values += chat.key
    return cache / hashlib.blake2b(json.dumps(values).encode(), digest_size=12).hexdigest()


def _whole(folder: Path) -> bool:
    """Whether a shard is there with all of its tokens; a damaged one is tokenized again."""
    try:
        meta = core_records.read_record(folder / "meta.json", ShardMeta)
        names = FILES if meta.targets is None else (*FILES, TARGETS)
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in names}
    except (CheckpointError, OSError):
        return False
    wanted = dict.fromkeys(FILES, 8 * meta.records)
    wanted |= {"tokens": np.dtype(meta.dtype).itemsize * meta.tokens, "kinds": meta.records}
    if meta.targets is not None:
        wanted[TARGETS] = meta.tokens
    return meta.format == FORMAT and sizes == wanted


def _array(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def open_shard(folder: Path) -> Shard:
    """A shard that is in the cache."""
    meta = core_records.read_record(folder / "meta.json", ShardMeta).model_dump()
    return Shard(
        folder=folder,
        tokens=_array(folder / "tokens.bin", meta["dtype"]),
        ends=_array(folder / "ends.bin", "<u8"),
        bytes=_array(folder / "bytes.bin", "<u8"),
        records=Records(
            _array(folder / "hashes.bin", "<u8"), _array(folder / "kinds.bin", np.uint8)
        ),
        meta=meta,
        targets=None if meta["targets"] is None else _array(folder / "targets.bin", np.uint8),
    )


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that gets its name once it is whole and durable; else nothing is left."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _fill(
    source: Source,
    partial: Path,
    tokenizer: Any,
    pool: TokenizerPool,
    bar: Progress,
    tail: float,
    reporter: Reporter,
    chat: ChatEncoder | None,
) -> None:
    """Write the files of a shard into a folder."""
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    commit = hub_dataset.commit_of(source.dataset) if source.dataset else None
    limit = source.dataset.max_tokens if source.dataset else None
    with _Writer(partial, dtype, tokenizer.eos_token_id, chat is not None) as writer:
        parallel = source.dataset is not None or source.size >= PARALLEL_FROM
        records = source.records(tail, commit)
        encoded = _conversations(records, chat) if chat else _encoded(records, pool, parallel)
        for record, ids, last, *targets in encoded:
            writer.add(record, ids, last, *targets)
            if last:
                bar.advance(len(ids) if source.dataset else len(record.text.encode()))
            if last and limit is not None and writer.tokens >= limit:
                break
    if tokenizer.eos_token_id is None and writer.records > 1:
        reporter.warn("the tokenizer has no end-of-text token: documents are joined without one")
    if source.dataset is not None:
        taken = f"{writer.tokens:,} tokens, {writer.records:,} documents"
        reporter.note(f"{source.name}: {taken} of {source.dataset.path} are in the cache.")
        if limit is not None and writer.tokens < limit:
            reporter.warn(
                f"{source.name}: {source.dataset.path} ends after {writer.tokens:,} tokens, "
                f"before max_tokens ({limit:,})"
            )
    meta = {"format": FORMAT, "dtype": dtype.str, "tokens": writer.tokens, "commit": commit}
    meta |= {"records": writer.records, "content": writer.digest.hexdigest()}
    if chat is not None:
        meta["targets"] = writer.targets
    write_file(partial / "meta.json", json.dumps(meta, indent=2) + "\n")


class _Writer:
    """Appends records to the files of a shard."""

    def __init__(
        self, folder: Path, dtype: np.dtype[Any], end: int | None, chat: bool = False
    ) -> None:
        names = (*FILES, TARGETS) if chat else FILES
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in names}
        self._dtype, self._end = dtype, end
        self.tokens = self.records = self.targets = 0
        self.digest = hashlib.blake2b(digest_size=12)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(
        self, record: Record, ids: np.ndarray, last: bool, targets: np.ndarray | None = None
    ) -> None:
        """Add a piece of a record; ``last`` closes it. A conversation is ended already."""
        if targets is not None:
            self._files[TARGETS].write(targets.tobytes())
            self.targets += int(targets.sum())
        # The head of a text file does not end the document: its tail follows.
        elif last and record.kind != HEAD and self._end is not None:
            ids = np.append(ids, np.uint32(self._end))
        self._files["tokens"].write(ids.astype(self._dtype).tobytes())
        self.tokens += len(ids)
        if not last:
            return
        # Of what a loss on some of the tokens is a mean over, bytes say nothing.
        size = 0 if targets is not None else len(record.text.encode())
        values = {"ends": self.tokens, "hashes": record.hash, "bytes": size}
        for name, value in values.items():
            self._files[name].write(value.to_bytes(8, "little"))
        self._files["kinds"].write(bytes([record.kind]))
        self.digest.update(record.hash.to_bytes(8, "little"))
        self.records += 1


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most PIECE characters, cut after a line break where there is one."""
    start = 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start, start + PIECE) + 1
        cut = cut if cut > start else start + PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]


def _conversations(
    records: Iterator[Record], chat: ChatEncoder
) -> Iterator[tuple[Record, np.ndarray, bool, np.ndarray]]:
    """(record, ids, True, targets) of each conversation, in order."""
    for record in records:
        for ids, targets in chat.encode([record.text]):
            yield record, ids, True, targets


def _encoded(
    records: Iterator[Record], pool: TokenizerPool, parallel: bool
) -> Iterator[tuple[Record, np.ndarray, bool]]:
    """(record, ids of a piece, whether it is the record's last piece), in order."""
    plan: list[list[tuple[Record, bool]]] = []  # of the batches that are on their way

    def batches() -> Iterator[list[str]]:
        texts: list[str] = []
        owners: list[tuple[Record, bool]] = []
        size = 0
        for record in records:
            cut = list(pieces(record.text))
            for number, text in enumerate(cut):
                texts.append(text)
                owners.append((record, number == len(cut) - 1))
                size += len(text)
                if size >= BATCH:
                    plan.append(owners)
                    yield texts
                    texts, owners, size = [], [], 0
        if texts:
            plan.append(owners)
            yield texts

    for ids in pool.encode(batches(), parallel=parallel):
        owners = plan.pop(0)
        for (record, last), piece in zip(owners, ids, strict=True):
            yield record, piece, last
