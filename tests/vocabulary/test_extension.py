"""Merges added behind those of a byte-pair encoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers_made import ENGLISH, GERMAN, byte_level, metaspace, with_added
from transformers import AutoTokenizer
from typer.testing import CliRunner

from growkit.cli.app import build_app
from growkit.core.errors import UsageError
from growkit.data.tokenizer_extension import extend_tokenizer
from growkit.vocabulary.tokens import read_tokens

TEXTS = [GERMAN] * 40


@pytest.mark.parametrize("kind", [byte_level, metaspace])
def test_old_tokens_keep_their_ids_and_text_survives(tmp_path: Path, kind: object) -> None:
    base = kind(tmp_path / "base")  # type: ignore[operator]
    done = extend_tokenizer(base, TEXTS, 40, tmp_path / "out")
    old, new = read_tokens(base), read_tokens(tmp_path / "out")
    assert {token: new.ids[token] for token in old.ids} == old.ids
    assert new.size == old.size + 40
    assert done.tokens_after < 0.8 * done.tokens_before
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (GERMAN, ENGLISH[0]):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids).strip() == text.strip()
    assert len(tokenizer(GERMAN).input_ids) < len(
        AutoTokenizer.from_pretrained(base)(GERMAN).input_ids
    )


def test_new_ids_stand_behind_added_tokens(tmp_path: Path) -> None:
    base = with_added(byte_level(tmp_path / "a"), tmp_path / "base", "<|user|>")
    extend_tokenizer(base, TEXTS, 10, tmp_path / "out")
    old, new = read_tokens(base), read_tokens(tmp_path / "out")
    assert new.ids["<|user|>"] == old.ids["<|user|>"] == old.size - 1
    assert sorted(set(new.ids.values()) - set(old.ids.values())) == list(
        range(old.size, old.size + 10)
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("a<|user|>").input_ids[-1] == old.size - 1
    )


def test_no_merge_crosses_words(tmp_path: Path) -> None:
    extend_tokenizer(metaspace(tmp_path / "base"), TEXTS, 60, tmp_path / "out")
    old, new = read_tokens(tmp_path / "base"), read_tokens(tmp_path / "out")
    added = set(new.ids) - set(old.ids)
    assert not any("\u2581" in token[1:] for token in added)


def test_too_little_text_and_other_models_are_refused(tmp_path: Path) -> None:
    base = byte_level(tmp_path / "base")
    with pytest.raises(UsageError, match=r"gives \d+ new merges, not 5,000"):
        extend_tokenizer(base, TEXTS, 5000, tmp_path / "out")
    with pytest.raises(UsageError, match="The text is empty"):
        extend_tokenizer(base, [], 5, tmp_path / "out")
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="is a WordLevel model"):
        extend_tokenizer(base, TEXTS, 5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_folder_or_nothing(tmp_path: Path) -> None:
    base = byte_level(tmp_path / "base")
    text = tmp_path / "de.txt"
    text.write_text(GERMAN * 20, encoding="utf-8")
    arguments = ["tokenizer", "extend", str(base), "--text", str(text), "--out"]
    result = CliRunner().invoke(build_app(), [*arguments, str(tmp_path / "out"), "--new", "20"])
    assert result.exit_code == 0, result.output
    assert "20 new tokens (" in result.output
    assert "growkit grow CKPT --tokenizer" in result.output
    refused = CliRunner().invoke(build_app(), [*arguments, str(tmp_path / "no"), "--new", "99999"])
    assert refused.exit_code != 0 and not list(tmp_path.glob("no*"))
