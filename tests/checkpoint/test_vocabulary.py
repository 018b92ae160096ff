# SPDX-License-Identifier: Apache-2.0
"""Tokenizers larger than the embedding, told from the files alone; padding stays silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny

from growkit.core.errors import CheckpointError
from growkit.vocabulary.tokenizer_size import check_ids, may_have_more_than, tokens_of

BPE = {"model": {"vocab": {"a": 0, "b": 9}}, "added_tokens": [{"id": 11, "content": "<x>"}]}
UNIGRAM = {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({"tokenizer.json": BPE}, 12),
        ({"tokenizer.json": UNIGRAM}, 2),
        ({"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<x>": 5}}, 6),
        ({"vocab.json": {"a": 0, "b": 1}}, 2),
        ({}, None),
        ({"tokenizer.json": {}}, None),
        ({"tokenizer.json": []}, None),
        ({"tokenizer.json": {"model": {"vocab": {"a": "0"}}, "added_tokens": [3, {}]}}, None),
    ],
)
def test_size_of_a_tokenizer(tmp_path: Path, files: dict[str, Any], size: int | None) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert tokens_of(tmp_path) == size
    for rows in (1, 2, 5, 6, 11, 12, 100):  # never a False where there are more
        assert may_have_more_than(tmp_path, rows) or size is None or size <= rows
    if "tokenizer.json" in files and files["tokenizer.json"] is BPE:
        assert may_have_more_than(tmp_path, 11) and not may_have_more_than(tmp_path, 12)


@pytest.mark.parametrize(("last", "warned"), [(255, False), (99, False), (256, True)])
def test_growth_warns_with_both_sizes(tmp_path: Path, last: int, warned: bool) -> None:
    source = tiny.make_folder(tmp_path / "source", tiny.llama_config(num_hidden_layers=1))
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": last}}}))
    said: list[str] = []
    tiny.grow(source, tmp_path / "out", ffn="x2", warn=said.append)
    assert [("257 tokens" in text and "256 rows" in text) for text in said] == [True] * warned


def test_a_text_with_a_token_without_a_row(tmp_path: Path) -> None:
    check_ids(257, 258, 274, tmp_path)
    with pytest.raises(CheckpointError, match=r"has 274 tokens and the embedding 258 rows.*258"):
        check_ids(258, 258, 274, tmp_path)
