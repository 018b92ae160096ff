"""The tokens of a tokenizer folder, and how its model splits a piece of text; needs no torch.

Byte-level tokenizers (GPT-2, Llama 3, Qwen) spell every byte as one printable character;
SentencePiece-like ones (Llama 2, Gemma, T5) spell a space as U+2581 and a byte that they have no
character for as ``<0x0A>``. To compare the two, a token is taken as the bytes that it stands for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from growkit.checkpoint.links import check_links
from growkit.core.errors import UsageError
from growkit.core.names import TOKENIZER

BYTE_LEVEL, METASPACE, PLAIN = "byte-level", "metaspace", "plain"
SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CONVERT = (
    "Save it as a fast tokenizer: transformers.AutoTokenizer.from_pretrained(FOLDER)"
    ".save_pretrained(OUT)."
)


def _byte_characters() -> dict[int, str]:
    """byte -> the character that stands for it (GPT-2, ``bytes_to_unicode``)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + place) for place, byte in enumerate(hidden)
    }


_CHARACTER = _byte_characters()
_BYTE = {character: byte for byte, character in _CHARACTER.items()}


def is_byte(token: str) -> bool:
    """A SentencePiece-like token for one byte."""
    return _BYTE_TOKEN.fullmatch(token) is not None


@dataclass(frozen=True, eq=False)
class Tokens:
    """A tokenizer, as rows of an embedding see it.

    Attributes:
        folder: where it lies.
        backend: the ``tokenizers.Tokenizer``.
        ids: token -> id, added tokens included.
        added: the added tokens, special ones among them; they stand for their own text.
        special: the special ones.
        spelling: ``byte-level``, ``metaspace`` or ``plain``.
    """

    folder: Path
    backend: Any
    ids: Mapping[str, int]
    added: frozenset[str]
    special: frozenset[str]
    spelling: str

    @property
    def size(self) -> int:
        """One more than the largest id: rows that an embedding needs."""
        return max(self.ids.values(), default=-1) + 1

    @cached_property
    def by_bytes(self) -> Mapping[bytes, int]:
        """Bytes that a token stands for -> its id; added tokens stand apart."""
        return {self.bytes_of(t): i for t, i in self.ids.items() if t not in self.added}

    def bytes_of(self, token: str) -> bytes:
        """The UTF-8 bytes that a token stands for."""
        if token in self.added:
            return token.encode()
        if self.spelling == BYTE_LEVEL:
            if all(character in _BYTE for character in token):
                return bytes(_BYTE[character] for character in token)
            return token.encode()
        if self.spelling == METASPACE:
            if byte := _BYTE_TOKEN.fullmatch(token):
                return bytes([int(byte[1], 16)])
            return token.replace(SPACE, " ").encode()
        return token.encode()

    def id_of(self, token: str, other: Tokens) -> int | None:
        """The id of ``other``'s token here: the same string where both spell alike, else the same
        bytes; an added token is the same added token, or a plain one of that text."""
        if token in other.added or self.spelling == other.spelling:
            return self.ids.get(token)
        return self.by_bytes.get(other.bytes_of(token))

    def split(self, token: str, other: Tokens) -> tuple[int, ...]:
        """The ids into which this tokenizer splits a token of ``other``; unknown pieces left out.

        The model alone splits the piece, without normalising or adding spaces, where both spell
        text alike or the bytes can be spelled here; an added token is encoded as text.
        """
        if token in other.added:
            text = token
        elif self.spelling == other.spelling:
            return self._pieces(token)
        else:
            content = other.bytes_of(token)
            if self.spelling == BYTE_LEVEL:
                return self._pieces("".join(_CHARACTER[byte] for byte in content))
            if self.spelling == METASPACE:
                return self._with_bytes(content)
            text = content.decode("utf-8", errors="ignore")
        encoded = self.backend.encode(text, add_special_tokens=False).ids
        return tuple(index for index in encoded if index != self._unknown)

    def _with_bytes(self, content: bytes) -> tuple[int, ...]:
        """Pieces of whole characters, and byte tokens for parts of characters."""
        found: list[int] = []
        text = content.decode("utf-8", errors="surrogateescape").replace(" ", SPACE)
        for broken, run in groupby(text, lambda character: "\udc80" <= character <= "\udcff"):
            if broken:
                names = (f"<0x{ord(character) - 0xDC00:02X}>" for character in run)
                found += (self.ids[name] for name in names if name in self.ids)
            else:
                found += self._pieces("".join(run))
        return tuple(found)

    def _pieces(self, piece: str) -> tuple[int, ...]:
        found = (token.id for token in self.backend.model.tokenize(piece)) if piece else ()
        return tuple(index for index in found if index != self._unknown)

    @cached_property
    def _unknown(self) -> int | None:
        token = getattr(self.backend.model, "unk_token", None)
        return None if token is None else self.ids.get(token)


def read_tokens(folder: Path) -> Tokens:
    """The tokenizer of a folder (or of a tokenizer.json).

    Raises:
        UsageError: there is none, or none that the ``tokenizers`` library reads.
    """
    file = folder / TOKENIZER if folder.is_dir() else folder
    if not file.is_file():
        raise UsageError(f"{str(folder)!r} holds no tokenizer.json.", _CONVERT)
    check_links(file.parent)
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UsageError(f"{str(file)!r} cannot be read: {error}", _CONVERT) from error
    return tokens_of_backend(backend, file.parent)


def tokens_of_backend(backend: Any, folder: Path) -> Tokens:
    """The tokens of a ``tokenizers.Tokenizer`` that was read from ``folder``."""
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return Tokens(
        folder=folder,
        backend=backend,
        # The library gives them in another order each time.
        ids=dict(sorted(vocabulary.items(), key=lambda entry: entry[1])),
        added=frozenset(token.content for token in added.values()),
        special=frozenset(token.content for token in added.values() if token.special),
        spelling=_spelling(backend),
    )


def _spelling(backend: Any) -> str:
    """How the tokenizer spells text, from its parts other than the vocabulary."""
    parts = (backend.decoder, backend.pre_tokenizer, backend.normalizer)
    texts = [part.__getstate__().decode() for part in parts if part is not None]
    if any(_names(json.loads(text), "ByteLevel") for text in texts):
        return BYTE_LEVEL
    spaces = any(SPACE in json.dumps(json.loads(text), ensure_ascii=False) for text in texts)
    return METASPACE if spaces else PLAIN


def _names(value: Any, kind: str) -> bool:
    if isinstance(value, dict):
        return value.get("type") == kind or any(_names(v, kind) for v in value.values())
    return isinstance(value, list) and any(_names(v, kind) for v in value)
