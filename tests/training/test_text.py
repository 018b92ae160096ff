"""Readers of the three kinds of files, and a held-out part that training never sees."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growkit.errors import UsageError
from growkit.training.text import Corpus, cut_tail, read_documents


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[str], field: str = "text") -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": range(len(texts)), field: texts}), path)
    return path


TEXTS = [f"document {i}\nwith two lines, naïve café" for i in range(40)]


def test_one_document_a_row_and_one_a_text_file(tmp_path: Path) -> None:
    assert list(read_documents(write_jsonl(tmp_path / "a.jsonl", TEXTS))) == TEXTS
    assert list(read_documents(write_parquet(tmp_path / "a.parquet", TEXTS))) == TEXTS
    whole = tmp_path / "a.txt"
    whole.write_text("\n".join(TEXTS))
    assert list(read_documents(whole)) == ["\n".join(TEXTS)]
    assert list(read_documents(write_jsonl(tmp_path / "b.jsonl", ["x", "  \n", "y"]))) == ["x", "y"]
    assert list(read_documents(write_jsonl(tmp_path / "c.jsonl", ["x"], "body"), "body")) == ["x"]


def test_bad_files(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.txt' is not UTF-8 text \(byte 2"):
        list(read_documents(latin))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UsageError, match="line 2 is not JSON"):
        list(read_documents(broken))
    with pytest.raises(UsageError, match=r"line 1 has no text in field 'text'.*id, body"):
        list(read_documents(write_jsonl(tmp_path / "body.jsonl", ["x"], "body")))
    with pytest.raises(UsageError, match=r"no column 'text'.*Did you mean 'texts'"):
        list(read_documents(write_parquet(tmp_path / "body.parquet", ["x"], "texts")))
    fake = tmp_path / "fake.parquet"
    fake.write_text("no parquet")
    with pytest.raises(UsageError, match="is not a parquet file"):
        list(read_documents(fake))
    with pytest.raises(UsageError, match=r"unknown kind.*\.txt, \.jsonl, \.parquet"):
        Corpus(files=[tmp_path / "text.csv"])
    with pytest.raises(UsageError, match="does not exist"):
        Corpus(files=[tmp_path / "absent.txt"])


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    original = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"pip install 'growkit\[data\]'"):
        list(read_documents(path))


def test_held_out_rows_are_never_trained_on(tmp_path: Path) -> None:
    texts = TEXTS + TEXTS[:20]  # exact duplicates must not straddle the split
    corpus = Corpus(files=[write_jsonl(tmp_path / "a.jsonl", texts)], eval_fraction=0.25)
    train, held_out = list(corpus.train_documents()), list(corpus.eval_documents())
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    assert len(set(held_out)) == 10
    reordered = Corpus(files=[write_jsonl(tmp_path / "b.jsonl", texts[::-1])], eval_fraction=0.25)
    assert set(reordered.eval_documents()) == set(held_out)


def test_small_fraction_still_holds_out_a_row(tmp_path: Path) -> None:
    corpus = Corpus(files=[write_jsonl(tmp_path / "a.jsonl", TEXTS)], eval_fraction=0.001)
    assert len(list(corpus.eval_documents())) == 1
    one = Corpus(files=[write_jsonl(tmp_path / "b.jsonl", ["x", "x"])])
    with pytest.raises(UsageError, match=r"only 1 different rows.*eval_files"):
        list(one.train_documents())


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1), st.floats(0.01, 0.9))
def test_head_and_tail_are_the_text(text: str, fraction: float) -> None:
    head, tail = cut_tail(text, fraction)
    assert head + tail == text


def test_tail_of_a_text_file_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"line {i}" for i in range(1000)))
    corpus = Corpus(files=[path], eval_fraction=0.1)
    (train,), (held_out,) = corpus.train_documents(), corpus.eval_documents()
    assert train + held_out == path.read_text()
    assert held_out.startswith("line ") and train.endswith("\n")
    assert 0.09 < len(held_out) / len(train + held_out) < 0.12


def test_separate_held_out_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", write_jsonl(tmp_path / "b.jsonl", TEXTS)
    first.write_text("train on me")
    corpus = Corpus(files=[first], eval_files=[second])
    assert list(corpus.train_documents()) == ["train on me"]
    assert list(corpus.eval_documents()) == TEXTS
    with pytest.raises(UsageError, match=r"in data\.files and in data\.eval_files"):
        Corpus(files=[first, second], eval_files=[tmp_path / "." / "b.jsonl"])
    assert list(Corpus(files=[first], eval_fraction=0).eval_documents()) == []


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    before = Corpus(files=[path]).fingerprint()
    assert Corpus(files=[path]).fingerprint() == before
    assert Corpus(files=[path], eval_fraction=0.3).fingerprint() != before
    write_jsonl(path, [*TEXTS[:-1], "document 39\nwith two lines, naive café"])
    assert Corpus(files=[path]).fingerprint() != before
