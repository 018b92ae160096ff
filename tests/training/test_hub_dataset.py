"""Datasets through Hugging Face ``datasets``: local folders here, so that no network is asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from growkit.core.errors import GrowkitError, UsageError
from growkit.data import hub_dataset
from growkit.data.packing import PackedText, pack
from growkit.data.recipe import DataSection
from growkit.data.sources import corpus_of
from growkit.data.tokenizer import load_tokenizer, train_bpe
from growkit.training import Silent

TEXTS = [f"row number {i} of the dataset" for i in range(60)]


class Listening(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)

    note = warn


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer") / "bytes"
    train_bpe([], 257, folder)
    return load_tokenizer(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS))
    (folder / "train.jsonl").write_text(rows)
    return folder


def read(folder: Path, tokenizer: Any, cache: Path, **options: Any) -> tuple[PackedText, list[str]]:
    field = options.pop("text_field", "text")
    section = DataSection.model_validate(
        {"dataset": {"path": str(folder), **options}, "text_field": field, "eval_fraction": 0}
    )
    reporter = Listening()
    return pack(corpus_of(section), tokenizer, "bytes", cache, reporter, workers=1), reporter.said


def text_of(packed: PackedText, tokenizer: Any) -> list[str]:
    (stream,) = packed.train
    joined = tokenizer.decode(stream.tokens(0, len(stream)))
    assert joined.endswith(tokenizer.eos_token)
    return joined.split(tokenizer.eos_token)[:-1]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_documents(streaming: bool, folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"streaming": True, "max_tokens": 10**6} if streaming else {}
    packed, said = read(folder, tokenizer, tmp_path / "cache", **options)
    assert text_of(packed, tokenizer) == TEXTS
    assert any("60 documents" in line for line in said)
    assert any("ends after" in line for line in said) == streaming


def test_saved_dataset(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "several")
    packed, _ = read(tmp_path / "one", tokenizer, tmp_path / "cache")
    assert text_of(packed, tokenizer) == TEXTS
    packed, _ = read(tmp_path / "several", tokenizer, tmp_path / "cache", split="test")
    assert text_of(packed, tokenizer) == TEXTS


def test_stream_is_taken_up_to_the_stated_tokens(
    folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Whole documents until there are as many tokens; what was taken is not read again."""
    sizes = np.cumsum([len(text) + 1 for text in TEXTS])
    limit = int(sizes[24]) - 3
    options = {"streaming": True, "max_tokens": limit}
    packed, said = read(folder, tokenizer, tmp_path / "cache", **options)
    assert text_of(packed, tokenizer) == TEXTS[:25]
    assert said == [f"data: {sizes[24]:,} tokens, 25 documents of {folder} are in the cache."]
    again, said = read(folder, tokenizer, tmp_path / "cache", **options)
    assert again.key == packed.key and said == []


def test_broken_stream_is_an_error_and_leaves_nothing(
    folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = hub_dataset._load

    class Breaks:
        def __init__(self, rows: Any) -> None:
            self.rows, self.column_names = rows, rows.column_names

        def select_columns(self, names: list[str]) -> Breaks:
            return self

        def __iter__(self) -> Any:
            for number, row in enumerate(self.rows):
                if number == 30:
                    raise ConnectionError("the line went dead")
                yield row

    monkeypatch.setattr(hub_dataset, "_load", lambda *a: Breaks(original(*a)))
    options = {"streaming": True, "max_tokens": 10**6}
    with pytest.raises(GrowkitError, match="stopped: the line went dead"):
        read(folder, tokenizer, tmp_path / "cache", **options)
    assert not list((tmp_path / "cache").glob("*/meta.json"))
    monkeypatch.setattr(hub_dataset, "_load", original)
    packed, _ = read(folder, tokenizer, tmp_path / "cache", **options)
    assert text_of(packed, tokenizer) == TEXTS


def test_what_is_not_there(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UsageError, match=r"no column 'txet'\. Did you mean 'text'"):
        read(folder, tokenizer, cache, text_field="txet")
    with pytest.raises(UsageError, match="holds int, not text"):
        read(folder, tokenizer, cache, text_field="id")
    with pytest.raises(UsageError, match=r"cannot be loaded: Unknown split"):
        read(folder, tokenizer, cache, split="validation")


def test_without_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    section = DataSection.model_validate({"dataset": {"path": str(folder)}})
    with pytest.raises(UsageError, match=r"pip install 'growkit\[data\]'"):
        corpus_of(section)
