"""Passages end on a word that stood in them before, and tasks are what the harness reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import last_word

from growkit.samples import sample_text

TEXT = sample_text()[:80_000]
STORY = (
    "The keeper of the lighthouse had one friend in the village. Every evening he climbed the "
    "stairs of the lighthouse and lit the lantern. When the storm came, he "
    "rowed out to warn the fishermen. Nobody had ever thanked him for the lantern"
)


def test_the_word_stood_before_though_not_in_its_sentence() -> None:
    rows = list(last_word.passages(TEXT))
    assert len(rows) > 20
    for row in rows:
        words = [word.lower() for word in last_word.WORD.findall(row["context"])]
        assert row["word"].lower() in words
        assert len(row["context"].split()) >= 60
        assert row["choices"][row["label"]] == row["word"]
        assert len({choice.lower() for choice in row["choices"]}) == last_word.CHOICES
        assert all(choice.lower() in words for choice in row["choices"])


def test_passages_share_no_sentence() -> None:
    text = " ".join(TEXT.split())
    end = 0
    for row in last_word.passages(TEXT):
        start = text.find(row["context"], end)
        assert start >= end, "in the order of the text, one after the other"
        end = start + len(row["context"])
        assert text[end:].startswith(f" {row['word']}")


@pytest.mark.parametrize(
    ("ending", "found"),
    [
        (".", 1),
        (" of the lighthouse.", 1),
        (" or the lantern.", 0),  # it stands in the last sentence too
        (" of the castle.", 0),  # it never stood before
        (" of the one.", 0),  # grammar alone foretells short words
        (", the 'lantern.", 0),  # no space before the word
    ],
)
def test_which_sentences_end_a_passage(ending: str, found: int) -> None:
    assert len(list(last_word.passages(STORY + ending, words=20))) == found


def test_right_answers_stand_at_every_place() -> None:
    labels = [row["label"] for row in last_word.passages(TEXT)]
    counts = [labels.count(place) for place in range(last_word.CHOICES)]
    assert min(counts) > len(labels) / last_word.CHOICES / 3


def test_files_are_the_same_again_and_name_their_data(tmp_path: Path) -> None:
    rows = last_word.spread(list(last_word.passages(TEXT)), 7)
    assert len(rows) == 7
    names = last_word.write_tasks("plays", rows, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = last_word.spread(list(last_word.passages(TEXT)), 7)
    last_word.write_tasks("plays", again, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert names == ["last_word_plays", "last_word_choice_plays"]
    for name in names:
        task = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        assert task["task"] == name
        data = Path(task["dataset_kwargs"]["data_files"]["test"])
        assert [json.loads(line) for line in data.read_text().splitlines()] == rows
