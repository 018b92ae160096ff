"""More merges behind those of a byte-pair encoding, trained on the text of a new domain.

Continued BPE: the text is split by the base tokenizer, its tokens become the letters of an alphabet
of their own, and the trainer of the ``tokenizers`` library learns merges of these letters. Every
old token keeps its id and every old merge its rank, so a word that no new merge touches is split as
before.

A SentencePiece-like tokenizer falls back to bytes for a character that it does not have, and merges
of bytes would not decode: the frequent ones of these characters become tokens first.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from growkit.core.errors import UsageError
from growkit.core.json_files import read_json_object
from growkit.core.names import TOKENIZER
from growkit.vocabulary.tokenizer_files import MAX_TOKENIZER_BYTES, OTHER_FORMS, tokenizer_files
from growkit.vocabulary.tokens import METASPACE, SPACE, Tokens, is_byte, read_tokens

_LETTER = 0x10000  # above the surrogates: one letter for each of a million ids
_HELD_OUT = 20  # every twentieth document measures the compression
_CACHED_WORDS = 1_000_000
_COVERED = 0.9995  # of the occurrences of missing characters, as SentencePiece's coverage


@dataclass(frozen=True)
class Extension:
    """What an extension did.

    Attributes:
        old_size, new_size: tokens before and after.
        example: some of the new tokens, the first learned first.
        documents, bytes: held-out documents, and their UTF-8 bytes.
        tokens_before, tokens_after: into which they are split.
    """

    old_size: int
    new_size: int
    example: tuple[str, ...]
    documents: int
    bytes: int
    tokens_before: int
    tokens_after: int

    @property
    def summary(self) -> str:
        """One line: compression before and after on text that was not trained on."""
        before, after = (self.bytes / max(1, n) for n in (self.tokens_before, self.tokens_after))
        return (
            f"{self.new_size - self.old_size:,} new tokens ({self.old_size:,} -> "
            f"{self.new_size:,}); held-out text: {before:.3f} -> {after:.3f} bytes per token "
            f"({1 - self.tokens_after / max(1, self.tokens_before):.1%} fewer tokens)"
        )


def extend_tokenizer(
    base: Path,
    documents: Iterable[str],
    new: int,
    out: Path,
    *,
    limit: int = 200_000_000,
    min_frequency: int = 2,
    advance: Callable[[int], None] = lambda count: None,
) -> Extension:
    """Train ``new`` further tokens on ``documents`` and write the extended tokenizer's folder.

    Args:
        base: folder of a byte-pair encoding with a tokenizer.json.
        documents: the text; every twentieth document is held out to measure the compression.
        new: tokens to add.
        out: a folder, made if it is not there.
        limit: at most so many bytes of text are read.
        min_frequency: a merge is learned from so many occurrences.
        advance: called with the bytes read.

    Raises:
        UsageError: no byte-pair encoding, too little text for so many merges.
    """
    old = read_tokens(base)
    content = read_json_object(_file(base), limit=MAX_TOKENIZER_BYTES)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise UsageError(
            f"The tokenizer in {str(base)!r} is a {kind} model: merges cannot be added to it.",
            "Extend a byte-pair encoding, or add whole tokens with grow --add-tokens.",
        )
    if new < 1:
        raise UsageError(f"--new {new} adds nothing.", "Ask for 1 or more, for example 8000.")
    training, held_out = _split(documents, limit, advance)
    characters = _missing_characters(training, old, new // 2, min_frequency)
    letters = list(_as_letters(training, old, characters))
    merges, added = _learned(letters, old, characters, new, min_frequency)
    if len(added) < new:
        raise UsageError(
            f"The text gives {len(added):,} new merges, not {new:,}.",
            f"Give more text, or --new {len(added)}." if added else "Give more text.",
        )
    _write(base, out, _extended(content, old, merges, added))
    extended = read_tokens(out)
    return Extension(
        old.size,
        extended.size,
        tuple(extended.bytes_of(token).decode("utf-8", "replace") for token in list(added)[:8]),
        len(held_out),
        sum(len(text.encode()) for text in held_out),
        *(_count(tokens, held_out) for tokens in (old, extended)),
    )


def _file(base: Path) -> Path:
    return base / TOKENIZER if base.is_dir() else base


def _split(
    documents: Iterable[str], limit: int, advance: Callable[[int], None]
) -> tuple[list[str], list[str]]:
    training: list[str] = []
    held_out: list[str] = []
    total = 0
    for number, text in enumerate(documents):
        size = len(text.encode())
        total += size
        advance(size)
        # A single document is cut, so that something is held out of it too.
        if number % _HELD_OUT == _HELD_OUT - 1:
            held_out.append(text)
        else:
            training.append(text)
        if total >= limit:
            break
    if not held_out and training:
        cut = len(training[-1]) * (_HELD_OUT - 1) // _HELD_OUT
        training[-1], tail = training[-1][:cut], training[-1][cut:]
        held_out.append(tail)
    if not total:
        raise UsageError("The text is empty.", "Give --text files that hold text.")
    return training, held_out


def _missing_characters(
    documents: Iterable[str], old: Tokens, most: int, min_frequency: int
) -> dict[str, int]:
    """Frequent characters that the tokenizer spells as bytes -> the ids that they get."""
    if old.spelling != METASPACE:
        return {}
    counts = Counter(character for text in documents for character in text)
    missing = {c: n for c, n in counts.items() if c not in old.ids and not c.isspace()}
    wanted, covered = _COVERED * sum(missing.values()), 0
    chosen: dict[str, int] = {}
    for character in sorted(missing, key=lambda c: (-missing[c], c))[:most]:
        if covered >= wanted or missing[character] < min_frequency:
            break
        covered += missing[character]
        chosen[character] = old.size + len(chosen)
    return chosen


def _as_letters(
    documents: Iterable[str], old: Tokens, characters: Mapping[str, int]
) -> Iterator[str]:
    """Each document as words of letters, one per token; words of one token teach nothing."""

    @lru_cache(_CACHED_WORDS)
    def words(piece: str) -> tuple[str, ...]:
        """Tokens that are a part of a character's bytes end a word."""
        parts: list[list[int]] = [[]]
        for known, run in groupby(piece, characters.__contains__):
            if known:
                parts[-1] += [characters[character] for character in run]
                continue
            for token in old.backend.model.tokenize("".join(run)):
                if old.spelling == METASPACE and is_byte(token.value):
                    parts.append([])
                else:
                    parts[-1].append(token.id)
        return tuple("".join(chr(_LETTER + i) for i in ids) for ids in parts if len(ids) > 1)

    for text in documents:
        counted = Counter(_words(text, old.backend))
        yield " ".join(
            " ".join([word] * count) for piece, count in counted.items() for word in words(piece)
        )


def _words(text: str, backend: Any) -> Iterator[str]:
    """The pieces inside which merges happen; at a space where the tokenizer itself cuts nowhere."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    pieces = [text]
    if backend.pre_tokenizer is not None:
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    for piece in pieces:
        if SPACE in piece[1:]:
            yield from (SPACE + part for part in piece.removeprefix(SPACE).split(SPACE) if part)
        else:
            yield piece


def _learned(
    letters: list[str],
    old: Tokens,
    characters: Mapping[str, int],
    new: int,
    min_frequency: int,
) -> tuple[list[tuple[str, str]], dict[str, None]]:
    """Merges in the spelling of the tokenizer, and the tokens among their results that are new."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    spelled = {index: token for token, index in (*old.ids.items(), *characters.items())}
    alphabet = len(set("".join(letters)) - {" "})
    asked = new - len(characters)
    while True:
        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.BpeTrainer(
            vocab_size=alphabet + asked, min_frequency=min_frequency, show_progress=False
        )
        learner.train_from_iterator(letters, trainer)
        pairs = json.loads(learner.to_str())["model"]["merges"]
        merges: list[tuple[str, str]] = []
        added = dict.fromkeys(characters)
        for left, right in pairs:
            first, second = (
                "".join(spelled[ord(letter) - _LETTER] for letter in side) for side in (left, right)
            )
            merges.append((first, second))
            # The same text may be merged in two ways, or be a token already.
            if first + second not in old.ids:
                added[first + second] = None
            if len(added) == new:
                return merges, added
        if len(pairs) < asked:  # the text holds no more
            return merges, added
        asked += new - len(added)


def _extended(
    content: dict[str, Any], old: Tokens, merges: list[tuple[str, str]], added: dict[str, None]
) -> dict[str, Any]:
    """tokenizer.json with the new tokens behind all ids, added tokens' included."""
    model = dict(content["model"])
    vocab = dict(model["vocab"])
    # Named in the vocabulary, added tokens keep their ids when the library reads the file.
    vocab |= {token: old.ids[token] for token in old.added if token in old.ids}
    vocab |= {token: old.size + place for place, token in enumerate(added)}
    known = model["merges"]
    joined = bool(known) and isinstance(known[0], str)
    model["vocab"] = vocab
    model["merges"] = [*known, *(" ".join(m) if joined else list(m) for m in merges)]
    return {**content, "model": model}


def _write(base: Path, out: Path, content: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in tokenizer_files(base) if base.is_dir() else []:
        if path.name not in OTHER_FORMS and path.name != TOKENIZER:
            shutil.copyfile(path, out / path.name)
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (out / TOKENIZER).write_text(text, encoding="utf-8")


def _count(tokens: Tokens, texts: list[str]) -> int:
    encoded = tokens.backend.encode_batch(texts, add_special_tokens=False)
    return sum(len(one.ids) for one in encoded)
