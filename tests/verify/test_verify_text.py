"""What is compared on: windows of real text, with or without a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import verify_models as models
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from growkit.core.errors import CheckpointError, UsageError
from growkit.samples import sample_text
from growkit.verification import verify_checkpoints
from growkit.verification.windows import encoder, read_text, token_windows


def make_tokenizer(vocab_size: int, text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_windows_are_spread_over_the_text_and_do_not_vary() -> None:
    text = sample_text()
    take = {"tokens": 256, "window": 64, "vocab_size": 256}
    windows = token_windows(text, encoder(None, 256), **take)
    assert windows.shape == (4, 64)
    assert windows.equal(token_windows(text, encoder(None, 256), **take))
    found = [text.encode().find(bytes(row.tolist())) for row in windows]
    assert found == sorted(found)
    assert found[0] == 0
    assert found[3] > len(text) / 2


@pytest.mark.parametrize(
    ("text", "shape"), [("short text", (1, 10)), ("x" * 70, (2, 32)), ("word " * 13, (2, 32))]
)
def test_a_short_text_gives_what_it_holds(text: str, shape: tuple[int, int]) -> None:
    windows = token_windows(text, encoder(None, 256), tokens=128, window=32, vocab_size=256)
    assert windows.shape == shape


def test_ids_outside_the_vocabulary_are_the_checkpoints_fault() -> None:
    with pytest.raises(CheckpointError, match="token id 120, but vocab_size is 100"):
        token_windows("xxxx", encoder(None, 256), tokens=4, window=4, vocab_size=100)


def test_one_token_is_too_little() -> None:
    with pytest.raises(UsageError, match="1 token"):
        token_windows("x", encoder(None, 256), tokens=4, window=4, vocab_size=256)


def test_bad_text_files_are_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match=r"empty\.txt.* is empty"):
        read_text(tmp_path / "empty.txt")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(UsageError, match="not a file"):
        read_text(tmp_path / "none.txt")


def test_the_folders_tokenizer_is_used_and_a_different_one_is_noted(tmp_path: Path) -> None:
    text = sample_text()[:20000]
    model: Any = models.make_model(vocab_size=320)
    a, b = models.save(model, tmp_path / "a"), models.save(model, tmp_path / "b")
    small: dict[str, Any] = {"text": text, "tokens": 64, "window": 32, "generate_tokens": 0}

    assert verify_checkpoints(a, b, **small).tokenizer == "bytes"
    make_tokenizer(320, text).save_pretrained(a)
    one = verify_checkpoints(a, b, **small)
    assert one.tokenizer != "bytes"
    assert any("only one of the folders" in note for note in one.notes)
    make_tokenizer(320, text).save_pretrained(b)
    assert verify_checkpoints(a, b, **small).notes == ()
    make_tokenizer(300, "other words entirely " * 50).save_pretrained(b)
    report = verify_checkpoints(a, b, **small)
    assert any("tokenizers differ" in note for note in report.notes)
