# SPDX-License-Identifier: Apache-2.0
"""The one JSON reader: bounded in size, depth, number of values and digits; nothing ambiguous.

What Python's ``json`` accepts beyond the standard or answers with a crash is refused by a sentence:
nesting that ends in RecursionError, a key twice, lone surrogates (no UTF-8 file can hold them),
NaN and Infinity (1e999 included) unless asked for, integers that no field of a model can mean.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from growkit.core.errors import CheckpointError, GrowkitError
from growkit.core.files import COPY_AGAIN, MAX_TEXT_BYTES, read_bytes

MAX_DEPTH = 100
MAX_VALUES = 2_000_000  # a value takes up to 64 bytes in memory, so 3 bytes of text must not be one
MAX_DIGITS = 100
_STRING = re.compile(rb'"[^"]*"?')
_NOT_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(
    path: Path,
    *,
    limit: int = MAX_TEXT_BYTES,
    non_finite: bool = False,
    error: type[GrowkitError] = CheckpointError,
    remedy: str = COPY_AGAIN,
) -> Any:
    """The value of a JSON file.

    Args:
        path: the file, opened as :func:`growkit.core.files.open_regular` says.
        limit: most bytes.
        non_finite: accept NaN and Infinity, as Python writes them.
        error: the class that is raised.
        remedy: what the message advises.

    Raises:
        GrowkitError: (``error``) the file cannot be read or is not such JSON.
    """
    content = read_bytes(path, limit=limit, error=error, remedy=remedy)
    return parse_json(content, str(path), non_finite=non_finite, error=error, remedy=remedy)


def read_json_object(
    path: Path,
    *,
    limit: int = MAX_TEXT_BYTES,
    non_finite: bool = False,
    error: type[GrowkitError] = CheckpointError,
    remedy: str = COPY_AGAIN,
) -> dict[str, Any]:
    """:func:`read_json` for a file that must hold one object."""
    content = read_bytes(path, limit=limit, error=error, remedy=remedy)
    return parse_json_object(content, str(path), non_finite=non_finite, error=error, remedy=remedy)


def parse_json_object(
    content: bytes,
    file: str,
    *,
    non_finite: bool = False,
    error: type[GrowkitError] = CheckpointError,
    remedy: str = COPY_AGAIN,
) -> dict[str, Any]:
    """:func:`parse_json` for a value that must be an object."""
    value = parse_json(content, file, non_finite=non_finite, error=error, remedy=remedy)
    if not isinstance(value, dict):
        raise error(f"{file!r} is not a JSON object.", remedy)
    return value


def parse_json(
    content: bytes,
    file: str,
    *,
    non_finite: bool = False,
    error: type[GrowkitError] = CheckpointError,
    remedy: str = COPY_AGAIN,
) -> Any:
    """The value of JSON text in UTF-8; ``file`` names it in messages (see :func:`read_json`)."""
    try:
        _refuse_giants(content)
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=float if non_finite else _finite,
            parse_constant=float if non_finite else _constant,
        )
        if _SURROGATE.search(content):
            _refuse_lone_surrogates(value)
    except (ValueError, RecursionError) as cause:
        raise error(f"{file!r} is not valid JSON: {cause}.", remedy) from cause
    return value


def _refuse_giants(content: bytes) -> None:
    """Judge depth and number of values on the bytes, before an object is made of any."""
    if content.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it starts with a byte order mark, which JSON does not have")
    if len(content) > MAX_TEXT_BYTES and not content.isascii():
        # One letter beyond the basic plane makes Python store four bytes for each.
        raise ValueError(f"more than {MAX_TEXT_BYTES} bytes that are not all ASCII")
    opened = content.count(b"[") + content.count(b"{")
    if opened <= MAX_DEPTH and opened + content.count(b",") <= MAX_VALUES:
        return
    # Strings out, the escaped quotes first; a backslash outside a string is an error anyway.
    rest = _STRING.sub(b"", content.replace(rb"\\", b"").replace(rb"\"", b""))
    brackets = rest.translate(None, _NOT_BRACKETS)
    if len(brackets) + rest.count(b",") > 2 * MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    depth = 0
    for sign in brackets:
        depth += 1 if sign in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:80]!r} appears twice")
            seen.add(key)
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits ({text[:12]}...)")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _refuse_lone_surrogates(value: Any) -> None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str) and not is_text(item):
            raise ValueError(f"the string {item[:40]!a} has half of a surrogate pair")


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: it has no lone surrogate."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
