# SPDX-License-Identifier: Apache-2.0
"""Data that is not text in a field: what it is, and the command that makes text of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growkit.core.errors import nearest

_TOKENIZER = "from transformers import AutoTokenizer as T; t = T.from_pretrained('TOKENIZER')"
_CHAT_FIELDS = ("messages", "conversations", "conversation")
_ID_FIELDS = ("input_ids", "tokens", "token_ids")


def holds(value: Any) -> str:
    """What a value is, in words: ``token ids (a list of 100 integers)``."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return f"an object with the keys {', '.join(map(str, list(value)[:5])) or 'none'}"
    if not isinstance(value, list):
        return "null" if value is None else type(value).__name__
    count = len(value)
    if value and all(type(item) is int for item in value):
        return f"token ids (a list of {count} integers)"
    if _is_chat(value):
        return f"chat messages (a list of {count})"
    if value and all(isinstance(item, str) for item in value):
        return f"a list of {count} texts"
    return f"a list of {count} values" if value else "an empty list"


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and {"role", "from"} & m.keys() for m in value)
    )


def remedy(value: Any, field: str, path: str) -> str:
    """How to make text of a value that is none, as one command where there is one."""
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return "growkit tokenizes text itself. Decode them with their tokenizer: " + _each_line(
            f"t.decode(row[{field!r}])", path
        )
    if _is_chat(value):
        return (
            f"Set data.messages_field: {field} for a loss on the assistant's tokens, or write each "
            "conversation as one text: "
        ) + _each_line(f"t.apply_chat_template(row[{field!r}], tokenize=False)", path)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return "Join them to one text a document."
    return ""


def _each_line(text: str, path: str) -> str:
    code = (
        f"import json, sys; {_TOKENIZER}; "
        f"[print(json.dumps({{'text': {text}}})) for row in map(json.loads, open(sys.argv[1]))]"
    )
    source = path if path.endswith(".jsonl") else "DATA.jsonl"
    return f"python -c {_quoted(code)} {shlex.quote(source)} > text.jsonl"


def _quoted(code: str) -> str:
    return f'"{code}"' if not any(sign in code for sign in '"$`\\!') else shlex.quote(code)


def advice(field: str, row: Mapping[str, Any], path: str) -> str:
    """What to do about a row without text in ``field``."""
    if field in row:
        own = remedy(row[field], field, path)
    else:
        other = next((f for f in (*_CHAT_FIELDS, *_ID_FIELDS) if f in row), None)
        own = ""
        if other is not None and (how := remedy(row[other], other, path)):
            own = f"Field {other!r} holds {holds(row[other])}. {how}"
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if own and not texts:
        return own
    fields = f"Set data.text_field; the fields there are: {', '.join(map(str, row)) or 'none'}."
    if texts and field in row:
        fields = f"Set data.text_field to one that holds text: {', '.join(map(str, texts))}."
    return f"{own} {nearest(field, [name for name in texts if name != field])}{fields}".strip()


def conversion(path: Path) -> str:
    """The command that makes a kind that is read of a file of another kind; or an empty string."""
    name, suffix = str(path), path.suffix.lower()
    target = shlex.quote(str(path.with_suffix(".jsonl")))
    if suffix in (".ndjson", ".jsonlines") or (suffix == ".json" and _begins_with(path, b"{")):
        return f"If it holds one JSON object a line, rename it: mv {shlex.quote(name)} {target}"
    if suffix in (".json", ".jsonl"):
        return (
            'Convert the array: python -c "import json, sys; [print(json.dumps(row)) for row in '
            f'json.load(open(sys.argv[1]))]" {shlex.quote(name)} > '
            + (target if suffix == ".json" else shlex.quote(str(path.with_suffix("")) + "-2.jsonl"))
        )
    if suffix in (".csv", ".tsv"):
        tab = ", delimiter='\\t'" if suffix == ".tsv" else ""
        code = (
            "import csv, json, sys; csv.field_size_limit(1 << 30); [print(json.dumps(row)) for row "
            f"in csv.DictReader(open(sys.argv[1], newline=''){tab})]"
        )
        return f"Convert it: python -c {_quoted(code)} {shlex.quote(name)} > {target}"
    if suffix in (".bin", ".idx", ".ds"):
        return "Token files are named under data.tokens in place of data.files."
    if suffix in (".md", ".text", ".html", ".htm", ".xml", ".rst", ".tex", ".log"):
        text = shlex.quote(str(path.with_suffix(".txt")))
        return f"If it is to be read as one text, copy it: cp {shlex.quote(name)} {text}"
    if suffix in (".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z"):
        return "Unpack it first."
    return ""


def _begins_with(path: Path, sign: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(sign)
    except OSError:
        return False
