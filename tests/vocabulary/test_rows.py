"""Where the rows of a grown vocabulary come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers_made import ENGLISH, GERMAN, byte_level, metaspace, with_added

from growkit.core.errors import UsageError
from growkit.vocabulary.embedding_rows import NEW, padded, rows_of_size, rows_of_tokenizer
from growkit.vocabulary.token_ids import moved_ids
from growkit.vocabulary.tokens import read_tokens


def test_the_same_tokenizer_keeps_every_row(tmp_path: Path) -> None:
    tokens = read_tokens(byte_level(tmp_path / "a"))
    rows = rows_of_tokenizer(tokens, tokens, tokens.size, tokens.size)
    assert (rows.source == np.arange(tokens.size)).all()
    assert (rows.new, rows.moved, rows.dropped) == (0, 0, ())


def test_tokens_keep_their_rows_wherever_their_id_moved(tmp_path: Path) -> None:
    old = read_tokens(byte_level(tmp_path / "a"))
    new = read_tokens(byte_level(tmp_path / "b", [*ENGLISH, GERMAN], 500))
    rows = rows_of_tokenizer(old, new, old.size, new.size)
    token_of = {index: token for token, index in old.ids.items()}
    for token, index in new.ids.items():
        if rows.source[index] == NEW:
            assert token not in old.ids
        else:
            assert token_of[rows.source[index]] == token
    assert rows.moved > 0 and rows.new > 0


@pytest.mark.parametrize("old_kind", [byte_level, metaspace])
@pytest.mark.parametrize("new_kind", [byte_level, metaspace])
def test_the_parts_of_a_new_token_spell_it(
    tmp_path: Path, old_kind: object, new_kind: object
) -> None:
    old = read_tokens(old_kind(tmp_path / "a"))  # type: ignore[operator]
    new = read_tokens(new_kind(tmp_path / "b", [*ENGLISH, GERMAN], 560))  # type: ignore[operator]
    rows = rows_of_tokenizer(old, new, old.size, new.size)
    spelled = {index: old.bytes_of(token) for token, index in old.ids.items()}
    token_of = {index: token for token, index in new.ids.items()}
    assert rows.parts
    for index, parts in rows.parts.items():
        if token_of[index] not in new.added:
            whole = b"".join(spelled[part] for part in parts)
            assert whole == new.bytes_of(token_of[index])
    # Every byte is representable in both, so only added tokens may have no spelling.
    missing = {token_of[i] for i in np.flatnonzero(rows.source == NEW) if i not in rows.parts}
    assert missing <= new.added


def test_another_spelling_of_the_same_bytes_is_the_same_token(tmp_path: Path) -> None:
    old = read_tokens(byte_level(tmp_path / "a"))
    new = read_tokens(metaspace(tmp_path / "b"))
    space_the = new.ids["\u2581the"]
    rows = rows_of_tokenizer(old, new, old.size, new.size)
    assert rows.source[space_the] == old.ids["\u0120the"]
    assert rows.source[new.ids["<0x0A>"]] == old.ids["\u010a"]


def test_rows_of_no_token_keep_or_repeat_the_old_padding(tmp_path: Path) -> None:
    old = read_tokens(byte_level(tmp_path / "a"))
    new = read_tokens(with_added(tmp_path / "a", tmp_path / "b", "<|user|>", "<|bot|>"))
    rows = rows_of_tokenizer(old, new, old.size + 4, padded(new.size, 64))
    first = old.size
    assert list(rows.source[first : first + 2]) == [NEW, NEW]  # the two tokens
    assert list(rows.source[first + 2 : first + 4]) == [first + 2, first + 3]
    assert set(rows.source[first + 4 :]) == {first}
    assert rows.parts[first] == tuple(old.backend.encode("<|user|>").ids)


def test_config_ids_move_with_their_tokens(tmp_path: Path) -> None:
    old = read_tokens(byte_level(tmp_path / "a"))
    new = read_tokens(metaspace(tmp_path / "b"))
    rows = rows_of_tokenizer(old, new, old.size, new.size)
    the, end = old.ids["\u0120the"], old.ids["<|end|>"]
    config = {
        "eos_token_id": [end, the],
        "text_config": {"pad_token_id": the, "hidden_size": the},
        "suppress_tokens": [the],
        "bos_token_id": end,
        "is_token_id": True,
    }
    moved, lost = moved_ids(config, rows)
    place = new.ids["\u2581the"]
    assert moved["eos_token_id"] == [place]
    assert moved["text_config"] == {"pad_token_id": place, "hidden_size": the}
    assert moved["suppress_tokens"] == [place]
    assert moved["bos_token_id"] is None and lost == ["eos_token_id", "bos_token_id"]


def test_what_cannot_be_matched_is_refused(tmp_path: Path) -> None:
    tokens = read_tokens(byte_level(tmp_path / "a"))
    with pytest.raises(UsageError, match="tokens and its embedding 10 rows"):
        rows_of_tokenizer(tokens, tokens, tokens.size, 10)
    with pytest.raises(UsageError, match="smaller than"):
        rows_of_size(100, 99)
    with pytest.raises(UsageError, match=r"holds no tokenizer\.json"):
        read_tokens(tmp_path)
