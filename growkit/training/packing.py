"""Documents as one long array of tokens on disk, cut into sequences of equal length.

Cache layout, one folder a (text, split, tokenizer), named by the hash of all three:
``train.bin`` and ``eval.bin`` (little-endian uint16, or uint32 for more than 65 536 tokens) and
``meta.json`` with the counts. Documents follow each other, each ended by the end-of-text token;
attention is not cut at document boundaries (ordinary packing).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from growkit.errors import UsageError
from growkit.progress import Reporter
from growkit.training.text import Corpus

FORMAT = 1
# Longer documents are tokenized in pieces cut after a line break, to bound memory.
PIECE = 16 << 20


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Sequence i is tokens ``[i * length, (i + 1) * length)``; a shorter rest is left out.

    An item holds ``input_ids`` and ``labels``, both int64 ``[length]``; the model shifts labels.
    """

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        piece = self.tokens[index * self.length : (index + 1) * self.length]
        ids = torch.from_numpy(piece.astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}


@dataclass(frozen=True)
class PackedText:
    """The packed tokens of a run: memory-mapped arrays, and the UTF-8 bytes they came from."""

    train: np.ndarray
    eval: np.ndarray
    train_bytes: int
    eval_bytes: int
    folder: Path

    @property
    def eval_bytes_per_token(self) -> float | None:
        """Average UTF-8 bytes of a held-out token, or None without held-out text."""
        return self.eval_bytes / len(self.eval) if len(self.eval) else None


def pack(
    corpus: Corpus, tokenizer: Any, fingerprint: str, cache: Path, reporter: Reporter
) -> PackedText:
    """Tokenize a corpus into the cache, or take what is there.

    Args:
        fingerprint: hash of the tokenizer's files (part of the cache key).
    """
    key = json.dumps([FORMAT, corpus.fingerprint(), fingerprint]).encode()
    folder = cache / hashlib.blake2b(key, digest_size=12).hexdigest()
    if not (folder / "meta.json").is_file():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
        meta: dict[str, Any] = {"format": FORMAT, "dtype": dtype.str}
        for name, documents in (
            ("train", corpus.train_documents()),
            ("eval", corpus.eval_documents()),
        ):
            meta[name] = _write(partial / f"{name}.bin", documents, tokenizer, dtype, reporter)
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    meta = json.loads((folder / "meta.json").read_text())
    return PackedText(
        train=_map(folder / "train.bin", meta["dtype"]),
        eval=_map(folder / "eval.bin", meta["dtype"]),
        train_bytes=meta["train"]["bytes"],
        eval_bytes=meta["eval"]["bytes"],
        folder=folder,
    )


def _map(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _write(
    path: Path, documents: Iterable[str], tokenizer: Any, dtype: np.dtype[Any], reporter: Reporter
) -> dict[str, int]:
    end = tokenizer.eos_token_id
    counts = {"documents": 0, "tokens": 0, "bytes": 0}
    with path.open("wb") as file:
        for document in documents:
            counts["documents"] += 1
            for piece in _pieces(document):
                ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                counts["tokens"] += len(ids)
                counts["bytes"] += len(piece.encode())
                file.write(np.asarray(ids, dtype=dtype).tobytes())
            if end is not None:
                file.write(np.asarray([end], dtype=dtype).tobytes())
                counts["tokens"] += 1
    if end is None and counts["documents"] > 1:
        reporter.warn("the tokenizer has no end-of-text token: documents are joined without one")
    return counts


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start, start + PIECE) + 1
        cut = cut if cut > start else start + PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]


def datasets(
    packed: PackedText, sequence_length: int, max_eval_tokens: int | None
) -> tuple[PackedDataset, PackedDataset | None]:
    """Training and held-out sequences; None when nothing is held out.

    Raises:
        UsageError: there is less text than one sequence.
    """
    train = PackedDataset(packed.train, sequence_length)
    if len(train) == 0:
        raise UsageError(
            f"The training text has {len(packed.train)} tokens, fewer than one sequence of "
            f"{sequence_length}.",
            "Give more text or a smaller data.sequence_length.",
        )
    if len(packed.eval) == 0:
        return train, None
    tokens = packed.eval if max_eval_tokens is None else packed.eval[:max_eval_tokens]
    held_out = PackedDataset(tokens, sequence_length)
    if len(held_out) == 0:
        raise UsageError(
            f"The held-out text has {len(tokens)} tokens, fewer than one sequence of "
            f"{sequence_length}.",
            "Raise data.eval_fraction or data.max_eval_tokens, give data.eval_files, or set "
            "data.eval_fraction: 0 for no evaluation.",
        )
    return train, held_out
