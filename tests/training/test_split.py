"""What is held out is never trained on, whatever the sources, the order and the duplicates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growkit.core.errors import UsageError
from growkit.data.held_out import HEAD, HELD_OUT, ROW, TAIL, TRAIN, Records, cut_tail, decide
from growkit.data.sources import Corpus, Source, file_hashes

TEXTS = [f"document {i}\nwith two lines, naïve café" for i in range(200)]


def rows(path: Path, texts: Sequence[str]) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(path.stem, files=[path])


def test_rows_are_held_out_by_their_content(tmp_path: Path) -> None:
    texts = TEXTS + TEXTS[:50]  # exact duplicates must not straddle the split
    corpus = Corpus([rows(tmp_path / "a.jsonl", texts)], eval_fraction=0.25)
    train, held_out = list(corpus.train_documents()), list(corpus.eval_documents())
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    assert 25 < len(set(held_out)) < 75
    reordered = Corpus([rows(tmp_path / "b.jsonl", texts[::-1])], eval_fraction=0.25)
    assert set(reordered.eval_documents()) == set(held_out)
    half = Corpus([rows(tmp_path / "c.jsonl", texts[:100])], eval_fraction=0.25)
    assert set(half.eval_documents()) == set(held_out) & set(texts[:100])


@settings(max_examples=200, deadline=None)
@given(
    sources=st.lists(
        st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=12),
        min_size=1,
        max_size=4,
    ),
    fraction=st.sampled_from([0.01, 0.1, 0.3, 0.9]),
    scale=st.sampled_from([1, 2**59]),
)
def test_no_text_is_on_both_sides(
    sources: list[list[tuple[int, bool]]], fraction: float, scale: int
) -> None:
    """Random documents, some of them text files in two parts, repeated within and across sources.

    The oracle is a set of (document, part): a row is both parts of its document.
    """

    def records(documents: list[tuple[int, bool]]) -> Records:
        parts = [
            (number * scale, kind)
            for number, is_file in documents
            for kind in ((HEAD, TAIL) if is_file else (ROW,))
        ]
        return Records(
            np.array([p[0] for p in parts], np.uint64), np.array([p[1] for p in parts], np.uint8)
        )

    all_records = [records(documents) for documents in sources]
    try:
        split = decide(all_records, fraction)
    except UsageError:
        assert any(len({number for number, _ in documents}) == 1 for documents in sources)
        return
    sides: dict[int, set[tuple[int, int]]] = {TRAIN: set(), HELD_OUT: set()}
    for found in all_records:
        here = split.sides(found.hashes, found.kinds)
        for side in sides:
            chosen = here == side
            for number, kind in zip(found.hashes[chosen], found.kinds[chosen], strict=True):
                sides[side] |= {
                    (int(number), p) for p in ((HEAD, TAIL) if kind == ROW else (kind,))
                }
        assert (here != TRAIN).any()
    assert not sides[TRAIN] & sides[HELD_OUT]


def test_duplicate_in_another_source_is_held_out_there_too(tmp_path: Path) -> None:
    one, two = rows(tmp_path / "a.jsonl", TEXTS), rows(tmp_path / "b.jsonl", TEXTS[::2])
    corpus = Corpus([one, two], eval_fraction=0.2)
    assert not set(corpus.train_documents()) & set(corpus.eval_documents())


def test_small_fraction_still_holds_out_a_row(tmp_path: Path) -> None:
    corpus = Corpus([rows(tmp_path / "a.jsonl", TEXTS)], eval_fraction=0.0001)
    assert len(list(corpus.eval_documents())) == 1
    one = Corpus([rows(tmp_path / "b.jsonl", ["x", "x"])])
    with pytest.raises(UsageError, match=r"only one document.*eval_files"):
        list(one.train_documents())


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1), st.floats(0.01, 0.9))
def test_head_and_tail_are_the_text(text: str, fraction: float) -> None:
    head, tail = cut_tail(text, fraction)
    assert head + tail == text


def test_tail_of_a_text_file_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"line {i}" for i in range(1000)))
    corpus = Corpus([Source(files=[path])], eval_fraction=0.1)
    (train,), (held_out,) = corpus.train_documents(), corpus.eval_documents()
    assert train + held_out == path.read_text()
    assert held_out.startswith("line ") and train.endswith("\n")
    assert 0.09 < len(held_out) / len(train + held_out) < 0.12


def test_many_text_files_are_held_out_whole(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    corpus = Corpus([Source(files=sorted(tmp_path.glob("*.txt")))], eval_fraction=0.1)
    held_out = "".join(corpus.eval_documents())
    whole = [text for text in TEXTS if text in held_out]
    assert 5 < len(whole) < 40 and sum(map(len, whole)) == len(held_out)


def test_separate_held_out_files(tmp_path: Path) -> None:
    first = tmp_path / "a.txt"
    first.write_text("train on me")
    source, held_out = rows(tmp_path / "c.jsonl", TEXTS), rows(tmp_path / "b.jsonl", TEXTS[:50])
    corpus = Corpus([Source(files=[first]), source], held_out=held_out)
    assert list(corpus.train_documents()) == ["train on me", *TEXTS[50:]]
    assert list(corpus.eval_documents()) == TEXTS[:50]
    with pytest.raises(UsageError, match=r"in data\.files and in data\.eval_files"):
        Corpus([source], held_out=Source(files=[tmp_path / "." / "c.jsonl"]))
    assert list(Corpus([Source(files=[first])], eval_fraction=0).eval_documents()) == []


def test_content_is_what_counts(tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", TEXTS)
    before = source.content()
    assert rows(tmp_path / "moved.jsonl", TEXTS).content() == before
    rows(tmp_path / "a.jsonl", [*TEXTS[:-1], "document 199\nwith two lines, naive café"])
    assert source.content() != before


def test_remembered_hashes_follow_changes(tmp_path: Path) -> None:
    import os

    path, memo = tmp_path / "a.txt", tmp_path / "memo.json"
    path.write_text("one")
    (first,) = file_hashes([path], memo)
    assert not memo.exists()  # it was written just now and may change within the clock's tick
    os.utime(path, (1e9, 1e9))
    assert file_hashes([path], memo) == [first] and first in memo.read_text()
    memo.write_text(memo.read_text().replace(first, "remembered"))
    assert file_hashes([path], memo) == ["remembered"]
    path.write_text("two")
    assert file_hashes([path], memo) not in ([first], ["remembered"])
