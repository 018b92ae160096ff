"""The files of a tokenizer in a Hugging Face folder, and those of one with added tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from growkit.core.errors import UsageError
from growkit.core.files import read_bytes, read_text
from growkit.core.json_files import parse_json_object
from growkit.core.names import TOKENIZER
from growkit.vocabulary.tokens import Tokens, tokens_of_backend

MAX_TOKENIZER_BYTES = 500_000_000
TEMPLATES = ("chat_template.jinja", "chat_template.json")
# Other forms of the vocabulary, which tokens that are added to tokenizer.json leave behind.
OTHER_FORMS = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")
# Copied as bytes, never re-saved; the order is that of a fingerprint.
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *OTHER_FORMS,
    *TEMPLATES,
)


# Any of these alone holds the tokens.
VOCABULARY_FILES = (TOKENIZER, *(name for name in OTHER_FORMS if name != "merges.txt"))


class AddedToken(NamedTuple):
    """A token to add; a special one is never split off a word and left out of decoded text."""

    content: str
    special: bool


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in a folder."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def tokenizer_contents(folder: Path) -> dict[str, bytes]:
    """Name -> content of the tokenizer's files."""
    return {
        path.name: read_bytes(path, limit=MAX_TOKENIZER_BYTES) for path in tokenizer_files(folder)
    }


def read_added(path: Path) -> list[AddedToken]:
    """The tokens of a file: one a line; a tab and ``special`` behind it marks a special one.

    Raises:
        UsageError: the file cannot be read, is empty, or a line has another mark.
    """
    found: dict[str, AddedToken] = {}
    text = read_text(path, error=UsageError, remedy="Give a text file with one token a line.")
    for number, line in enumerate(text.splitlines(), 1):
        content, tab, mark = line.partition("\t")
        if tab and mark.strip() != "special":
            raise UsageError(
                f"Line {number} of {str(path)!r} marks a token as {mark.strip()!r}.",
                "Write the token alone, or the token, a tab and: special.",
            )
        if content:
            found[content] = AddedToken(content, bool(tab))
    if not found:
        raise UsageError(f"{str(path)!r} holds no token.", "Write one token a line.")
    return list(found.values())


def with_added(
    old: Tokens, files: Mapping[str, bytes], added: Sequence[AddedToken]
) -> tuple[Tokens, dict[str, bytes]]:
    """A tokenizer with further tokens behind the old ones, and its files.

    Tokens that it has already keep their ids.

    Args:
        files: of the old tokenizer.
    """
    from tokenizers import AddedToken as Added
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(old.backend.to_str())
    backend.add_tokens(
        [
            Added(token.content, special=token.special, normalized=False)
            for token in added
            if token.content not in old.ids
        ]
    )
    new = tokens_of_backend(backend, old.folder)
    written = {name: content for name, content in files.items() if name not in OTHER_FORMS}
    written[TOKENIZER] = backend.to_str(pretty=True).encode()
    name = "tokenizer_config.json"
    if name in files:
        config = parse_json_object(files[name], name, non_finite=True)
        written[name] = _stated(config, new, added)
    name = "added_tokens.json"
    if name in files:
        known = parse_json_object(files[name], name)
        known |= {token.content: new.ids[token.content] for token in added}
        written[name] = _json(known)
    return new, written


def _stated(config: dict[str, Any], new: Tokens, added: Sequence[AddedToken]) -> bytes:
    """tokenizer_config.json, whose list of added tokens goes along with that of tokenizer.json."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for token in added:
            decoder.setdefault(
                str(new.ids[token.content]),
                {
                    "content": token.content,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": token.special,
                },
            )
    return _json(config)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
