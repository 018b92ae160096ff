"""Which tokens two checkpoints are compared on: equal windows spread evenly over a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from growkit.core.errors import CheckpointError, UsageError

Encode = Callable[[str], list[int]]


def encoder(tokenizer: Any | None, vocab_size: int) -> Encode:
    """The tokenizer's own encoding, or the text's UTF-8 bytes modulo the vocabulary size."""
    if tokenizer is None:
        return lambda text: [byte % vocab_size for byte in text.encode("utf-8")]
    return lambda text: list(tokenizer(text)["input_ids"])


def read_text(path: Path) -> str:
    """Raises:
    UsageError: the file is missing, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{str(path)!r} is not UTF-8 text (byte {error.start}).", "Give a plain text file."
        ) from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"{str(path)!r} is not a file.", "Give a plain text file.") from error
    if not text.strip():
        raise UsageError(f"{str(path)!r} is empty.", "Give a text of at least a few words.")
    return text


def token_windows(
    text: str, encode: Encode, *, tokens: int, window: int, vocab_size: int
) -> torch.Tensor:
    """Token ids ``[windows, length]``, a pure function of the arguments.

    About ``tokens`` tokens in windows of ``window``, spread evenly over the text; a text too short
    for that gives as many whole windows as it holds, or one shorter window.

    Raises:
        UsageError: fewer than two tokens.
        CheckpointError: the tokenizer gives ids outside the vocabulary.
    """
    length = min(window, tokens)
    count = max(1, tokens // length)
    rows = [_take(text, len(text) * i // count, encode, length) for i in range(count)]
    if any(len(row) < length for row in rows):
        ids = encode(text)
        count = min(count, max(1, len(ids) // length))
        step = len(ids) // count
        rows = [ids[i * step : i * step + length] for i in range(count)]
    if len(rows[0]) < 2:
        raise UsageError(
            f"The text gives {len(rows[0])} token(s); at least 2 are needed.",
            "Give a longer --text.",
        )
    windows = torch.tensor(rows, dtype=torch.long)
    if int(windows.max()) >= vocab_size:
        raise CheckpointError(
            f"The tokenizer gives token id {int(windows.max())}, but vocab_size is {vocab_size}.",
            "If tokens were added to the tokenizer, give the embedding rows for them first "
            "(growkit grow FOLDER --tokenizer FOLDER); else it is another model's.",
        )
    return windows


def _take(text: str, start: int, encode: Encode, length: int) -> list[int]:
    """``length`` tokens of the text from the first word at or after character ``start``."""
    if start:
        # Never start inside a word: such tokens are rare in training text.
        gap = next(
            (i for i in range(start, min(start + 64, len(text))) if text[i].isspace()), start
        )
        start = gap + 1
    characters = 8 * length
    while True:
        ids = encode(text[start : start + characters])
        if len(ids) >= length or start + characters >= len(text):
            return ids[:length]
        characters *= 4


def one_window(text: str, encode: Encode, length: int) -> torch.Tensor:
    """Token ids ``[1, length]`` of the text's beginning, repeated where the text is shorter."""
    ids = _take(text, 0, encode, length)
    return torch.tensor([(ids * (length // len(ids) + 1))[:length]], dtype=torch.long)


@dataclass(frozen=True)
class Source:
    """What makes the token ids: a text, an encoding of it, and the encoding's name."""

    text: str
    encode: Encode
    name: str


def comparison_windows(
    text: str | None,
    tokenizers: Sequence[Any | None],
    *,
    tokens: int,
    window: int,
    vocab_size: int,
    notes: list[str],
    only: Callable[[Encode], Encode] = lambda encode: encode,
) -> tuple[torch.Tensor, Source]:
    """Token ids ``[windows, length]`` and what made them; ``only`` restricts an encoding to the
    tokens that both folders have.

    The first tokenizer that there is makes them; a second one that disagrees, or is missing, is
    noted. Without any the text's bytes are the ids.
    """
    if text is None:
        from growkit.samples import sample_text

        text = sample_text()
    sizes = {"tokens": tokens, "window": window, "vocab_size": vocab_size}
    found = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    if not found:
        notes.append("no tokenizer: the text's bytes modulo the vocabulary size are the token ids")
        encode = only(encoder(None, vocab_size))
        return token_windows(text, encode, **sizes), Source(text, encode, "bytes")
    encodings = [only(encoder(tokenizer, vocab_size)) for tokenizer in found]
    made = [token_windows(text, encode, **sizes) for encode in encodings]
    if len(made) < len(tokenizers):
        notes.append("only one of the folders has a tokenizer that loads")
    elif any(not torch.equal(made[0], other) for other in made[1:]):
        notes.append("the two tokenizers differ: the first folder's is used")
    return made[0], Source(text, encodings[0], type(found[0]).__name__)
