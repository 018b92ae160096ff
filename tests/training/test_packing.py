"""Packed tokens are the documents, in order, each ended by the end-of-text token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from growkit.errors import UsageError
from growkit.training import Silent, packing
from growkit.training.packing import PackedDataset, datasets, pack
from growkit.training.text import Corpus
from growkit.training.tokenizer import load_tokenizer, tokenizer_fingerprint, train_bpe


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bytes"
    train_bpe([], 257, folder)
    return folder


def test_byte_tokenizer_keeps_every_text(byte_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(byte_tokenizer)
    text = "Naïve café, \n\n\t 中文 🎉 a  b"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokenizer) == 257
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_bpe_learns_merges_and_is_reproducible(tmp_path: Path) -> None:
    text = "the king and the queen and the king " * 50
    for name in ("a", "b"):
        train_bpe([text], 300, tmp_path / name)
    tokenizer = load_tokenizer(tmp_path / "a")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) < len(text) / 3
    assert tokenizer.decode(ids) == text
    assert tokenizer_fingerprint(tmp_path / "a") == tokenizer_fingerprint(tmp_path / "b")


def test_no_tokenizer_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no tokenizer.*tokenizer\.train_bpe"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_documents_are_joined_by_end_of_text(
    byte_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "first\\nline"}\n{"text": "second"}\n')
    corpus = Corpus(files=[rows], eval_fraction=0)
    tokenizer = load_tokenizer(byte_tokenizer)
    for piece in (packing.PIECE, 4):  # long documents are tokenized in pieces, without a seam
        monkeypatch.setattr(packing, "PIECE", piece)
        packed = pack(corpus, tokenizer, f"x{piece}", tmp_path / "cache", Silent())
        assert packed.train.dtype == np.uint16
        end = tokenizer.eos_token
        assert tokenizer.decode(packed.train.astype(int)) == f"first\nline{end}second{end}"
        assert packed.train_bytes == len("first\nlinesecond")
    assert len(packed.eval) == 0 and datasets(packed, 4, None)[1] is None


def test_cache_is_used_and_keyed_by_content(byte_tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n" * 100)
    tokenizer = load_tokenizer(byte_tokenizer)
    first = pack(Corpus(files=[path]), tokenizer, "x", tmp_path / "cache", Silent())
    (first.folder / "train.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    again = pack(Corpus(files=[path]), tokenizer, "x", tmp_path / "cache", Silent())
    assert again.train.tolist() == [0, 1, 2, 3, 4, 5]
    path.write_text("two\n" * 100)
    other = pack(Corpus(files=[path]), tokenizer, "x", tmp_path / "cache", Silent())
    assert other.folder != first.folder and len(other.train) > 300


def test_sequences(byte_tokenizer: Path) -> None:
    dataset = PackedDataset(np.arange(11, dtype=np.uint16), 4)
    assert len(dataset) == 2
    assert dataset[1]["input_ids"].tolist() == dataset[1]["labels"].tolist() == [4, 5, 6, 7]
    with pytest.raises(IndexError):
        dataset[2]


def test_too_little_text(byte_tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a few words\n" * 4)
    tokenizer = load_tokenizer(byte_tokenizer)
    packed = pack(Corpus(files=[path]), tokenizer, "x", tmp_path / "cache", Silent())
    with pytest.raises(UsageError, match=r"training text has \d+ tokens, fewer than one sequence"):
        datasets(packed, 512, None)
    with pytest.raises(UsageError, match="held-out text has"):
        datasets(packed, 20, None)
