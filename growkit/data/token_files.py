# SPDX-License-Identifier: Apache-2.0
"""Token files as shards: ids stay where they are, memory-mapped; what is known of them is cached.

Each file is read once. The token cache has then, in a folder named by the content of the file::

    ends.bin      uint64 [documents]: where each ends, in ids
    hashes.bin    uint64 [documents]: of its ids (as uint32), for the held-out split
    tokens.bin    the ids, of formats that are no flat run
    meta.json     counts, the largest id and where it stands; written last

A file that is one document (none of its ids is the end-of-text token) is like a text file: its tail
can be held out. Bytes of the text are not known, and so no bits per byte.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from pydantic import Field

from growkit.core import records as core_records
from growkit.core.errors import CheckpointError, UsageError
from growkit.core.progress import Progress, Reporter
from growkit.core.writing import write_file
from growkit.data.held_out import HEAD, ROW, TAIL, Records
from growkit.data.sources import Source, file_hashes
from growkit.data.token_cache import Shard, remove_leftovers, whole_folder
from growkit.data.token_formats import TokenFile

FORMAT = 1
SCAN = 1 << 22  # ids that are looked at together


class ScanMeta(core_records.Record):
    """``meta.json`` of a token file that was read."""

    format: int
    tokens: int = Field(gt=0)
    records: int = Field(gt=0)
    largest: int = Field(ge=0)
    largest_at: int = Field(ge=0)
    content: str


@dataclass(frozen=True)
class FileShard(Shard):
    """A shard whose ids are a token file; a copy for a data-loading process maps it again."""

    file: TokenFile
    tail: float

    def __reduce__(self) -> Any:
        return open_file_shard, (self.folder, self.file, self.tail)


def token_shards(
    source: Source,
    tokenizer: Any,
    vocabulary: int,
    cache: Path,
    reporter: Reporter,
    *,
    tail: float,
) -> list[Shard]:
    """A shard for each token file of a source.

    Args:
        vocabulary: of the model: ids are below it.
        tail: the part of a file that is one document that may have to be held out.

    Raises:
        UsageError: an id is beyond the vocabulary.
        GrowkitError: a file is damaged.
    """
    cache.mkdir(parents=True, exist_ok=True)
    files = [file.as_type(len(tokenizer)) for file in source.tokens]
    end = tokenizer.eos_token_id
    folders = [_folder(file, end, cache) for file in files]
    missing = [file for file, place in zip(files, folders, strict=True) if not _whole(place, file)]
    if missing:
        remove_leftovers(cache)
        total = sum(map(len, missing))
        with reporter.progress(f"reading tokens of {source.name}", total, unit="tokens") as bar:
            for file, folder in zip(files, folders, strict=True):
                with FileLock(folder.with_name(folder.name + ".lock")):
                    if not _whole(folder, file):
                        _write(file, folder, end, vocabulary, bar)
    shards = [
        open_file_shard(folder, file, tail) for file, folder in zip(files, folders, strict=True)
    ]
    for file, shard in zip(files, shards, strict=True):
        _check_id(file, shard.meta["largest"], shard.meta["largest_at"], vocabulary)
    return shards


def open_file_shard(folder: Path, file: TokenFile, tail: float) -> Shard:
    """The shard of a token file that was read."""
    meta = core_records.read_record(folder / "meta.json", ScanMeta).model_dump()
    ends: np.ndarray = np.memmap(folder / "ends.bin", "<u8", mode="r")
    hashes: np.ndarray = np.memmap(folder / "hashes.bin", "<u8", mode="r")
    kinds = np.full(len(ends), ROW, np.uint8)
    cut = round(int(ends[-1]) * (1 - tail))
    if len(ends) == 1 and 0 < cut < int(ends[-1]):
        ends = np.array([cut, ends[-1]], np.uint64)
        hashes, kinds = np.repeat(hashes, 2), np.array([HEAD, TAIL], np.uint8)
    unknown = np.broadcast_to(np.uint64(0), ends.shape)
    tokens = file.tokens() if file.mapped else np.memmap(folder / "tokens.bin", file.dtype, "r")
    return FileShard(folder, tokens, ends, unknown, Records(hashes, kinds), meta, file, tail)


def _folder(file: TokenFile, end: int | None, cache: Path) -> Path:
    content = file_hashes(file.files, cache / "file-hashes.json")
    key = json.dumps(["tokens", FORMAT, content, file.kind, file.dtype, file.offset, end])
    return cache / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


def _whole(folder: Path, file: TokenFile) -> bool:
    """Whether all is there; what is damaged is made again."""
    try:
        meta = core_records.read_record(folder / "meta.json", ScanMeta)
        wanted = {"ends": 8 * meta.records, "hashes": 8 * meta.records}
        if not file.mapped:
            wanted["tokens"] = np.dtype(file.dtype).itemsize * meta.tokens
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in wanted}
    except (CheckpointError, OSError):
        return False
    return meta.format == FORMAT and sizes == wanted


def _write(file: TokenFile, folder: Path, end: int | None, vocabulary: int, bar: Progress) -> None:
    tokens = file.tokens()  # small shards, where they are not mapped
    ends, largest, at = _looked_at(file, tokens, end, vocabulary, bar)
    with whole_folder(folder) as partial:
        hashes = _hashes(tokens, ends)
        if not file.mapped:
            (partial / "tokens.bin").write_bytes(tokens.tobytes())
        (partial / "ends.bin").write_bytes(ends.astype("<u8").tobytes())
        (partial / "hashes.bin").write_bytes(hashes.tobytes())
        content = hashlib.blake2b(hashes.tobytes(), digest_size=12).hexdigest()
        meta = {"format": FORMAT, "tokens": len(tokens), "records": len(ends), "content": content}
        meta |= {"largest": largest, "largest_at": at}
        write_file(partial / "meta.json", json.dumps(meta, indent=2) + "\n")


def _looked_at(
    file: TokenFile, tokens: np.ndarray, end: int | None, vocabulary: int, bar: Progress
) -> tuple[np.ndarray, int, int]:
    """(ends of the documents, the largest id, where it stands)."""
    if file.untyped and tokens.itemsize == 2 and len(tokens) > 16:
        high = tokens[1:SCAN:2]
        if not high.any() and len(tokens) % 2 == 0:
            raise UsageError(
                f"Every second id of the token file {str(file.path)!r} is 0, as uint32 ids read as "
                "uint16 are.",
                "Set token_dtype: uint32.",
            )
    largest = at = -1
    said = file.document_ends()
    found = [] if said is None else [said]
    for start in range(0, len(tokens), SCAN):
        block = tokens[start : start + SCAN]
        for place in {int(block.argmin()), int(block.argmax())}:
            value = int(block[place])
            _check_id(file, value, start + place, vocabulary)
            if value > largest:
                largest, at = value, start + place
        if said is None and end is not None:
            found.append(np.flatnonzero(block == end) + (start + 1))
        bar.advance(len(block))
    return np.unique(np.concatenate([*found, [len(tokens)]])).astype(np.int64), largest, at


def _check_id(file: TokenFile, value: int, place: int, vocabulary: int) -> None:
    if not 0 <= value < vocabulary:
        other = "" if not file.untyped else ", or set token_dtype (uint16 or uint32)"
        raise UsageError(
            f"Token {place:,} of {str(file.path)!r} ({file.kind}, {np.dtype(file.dtype).name}) is "
            f"{value} and the model's vocabulary has {vocabulary:,} ids.",
            f"Use files that the model's own tokenizer made{other}.",
        )


def _hashes(tokens: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """64 bits of the ids of each document, whatever type they are stored in."""
    hashes, start = np.empty(len(ends), "<u8"), 0
    for number, end in enumerate(ends.tolist()):
        digest = hashlib.blake2b(digest_size=8)
        for at in range(start, end, SCAN):
            digest.update(tokens[at : min(end, at + SCAN)].astype("<u4").tobytes())
        hashes[number], start = int.from_bytes(digest.digest(), "big"), end
    return hashes
