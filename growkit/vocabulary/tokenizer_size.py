# SPDX-License-Identifier: Apache-2.0
"""Does the embedding have a row for every token of the tokenizer? More rows than tokens are common.

A tokenizer to which tokens were added and an embedding that was not resized fit together until a
text holds one of the new tokens.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from growkit.core.errors import CheckpointError
from growkit.core.files import read_bytes
from growkit.core.json_files import read_json
from growkit.core.names import TOKENIZER

_MAX_BYTES = 500_000_000
_NUMBERS = re.compile(rb":\s*(\d+)")
_PIECES = re.compile(rb'"vocab"\s*:\s*\[')
_TOO_LARGE_TO_LOOK = 64_000_000  # a warning is not worth the memory


def tokens_of(folder: Path) -> int | None:
    """One more than the largest token id in a folder's tokenizer files; None where they do not say.

    Reads ``tokenizer.json``, or ``vocab.json`` with ``added_tokens.json``; needs no library.
    """
    try:
        whole = _read(folder / TOKENIZER)
        if isinstance(whole, dict):
            model = whole.get("model")
            return _size(model.get("vocab") if isinstance(model, dict) else None, whole)
        vocab = _read(folder / "vocab.json")
        if isinstance(vocab, dict):
            return _size(vocab, {"added_tokens": _read(folder / "added_tokens.json")})
    except CheckpointError:  # the tokenizer's own loader says what is wrong
        pass
    return None


def may_have_more_than(folder: Path, rows: int) -> bool:
    """Whether a folder's tokenizer may have a token id of ``rows`` or more: False is certain.

    Every id is a number behind a colon, so the largest such number bounds them all; finding it
    takes a tenth of the time of reading the file as JSON. A list of pieces has no ids.
    """
    path = folder / TOKENIZER
    try:
        if not path.is_file() or path.stat().st_size > _TOO_LARGE_TO_LOOK:
            return True
        content = read_bytes(path, limit=_TOO_LARGE_TO_LOOK)
    except (CheckpointError, OSError):
        return True
    if _PIECES.search(content):
        return True
    return any(len(n) > len(str(rows)) or int(n) >= rows for n in _NUMBERS.findall(content))


def _read(path: Path) -> Any:
    if not path.is_file() or path.stat().st_size > _TOO_LARGE_TO_LOOK:
        return None
    return read_json(path, limit=_MAX_BYTES, non_finite=True)


def _size(vocab: Any, whole: dict[str, Any]) -> int | None:
    ids: list[int] = []
    if isinstance(vocab, dict):
        ids += [value for value in vocab.values() if type(value) is int]
    elif isinstance(vocab, list):  # Unigram: pairs of piece and score
        ids.append(len(vocab) - 1)
    added = whole.get("added_tokens")
    if isinstance(added, dict):  # added_tokens.json
        ids += [value for value in added.values() if type(value) is int]
    elif isinstance(added, list):
        ids += [t["id"] for t in added if isinstance(t, dict) and type(t.get("id")) is int]
    return max(ids) + 1 if ids else None


def resize_remedy(folder: Path | str) -> str:
    """The command that gives the embedding its missing rows."""
    place, out = shlex.quote(str(folder)), shlex.quote(f"{folder}-resized")
    return f"Give the embedding rows for them: growkit grow {place} --tokenizer {place} --out {out}"


def check_ids(largest: int, rows: int, tokens: int, folder: Path | str) -> None:
    """Refuse a text that holds a token for which the embedding has no row.

    Args:
        largest: largest token id of the text.
        rows: rows of the embedding.
        tokens: size of the tokenizer.

    Raises:
        CheckpointError: with both sizes.
    """
    if largest >= rows:
        raise CheckpointError(
            f"The tokenizer of {str(folder)!r} has {tokens} tokens and the embedding {rows} rows: "
            f"token {largest} of the text has none.",
            resize_remedy(folder),
        )
