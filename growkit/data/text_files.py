"""Readers of local text: .txt, .jsonl and .parquet, the first two also as .gz and .zst.

A .txt file is one document, or several where it is larger than :data:`LARGEST` characters: it is
cut after the last line break before that (or blank, or just there). A .jsonl line and a .parquet
row are one document each, of at most that size. So memory is bounded whatever the files hold.
Endings may be in upper case. Folders and patterns stand for the files of these kinds in them, in
the order of their paths.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from growkit.core.errors import UsageError, nearest
from growkit.core.os_errors import system_failed
from growkit.data.chat import conversation_text
from growkit.data.data_kinds import advice, conversion, holds, remedy
from growkit.data.remote_files import files_at, is_remote, open_binary, url_of

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")
LARGEST = 32 << 20  # characters of a document; bytes of a line
_BLOCK = 1 << 20
_DAMAGE = (EOFError, OSError, zlib.error)
ALL_KINDS = (*KINDS, *(kind + end for kind in KINDS[:2] for end in COMPRESSED))


def kind_of(path: Path) -> str | None:
    """``.txt``, ``.jsonl`` or ``.parquet``; None for another kind."""
    name = path.name.lower()
    kind = next((kind for kind in ALL_KINDS if name.endswith(kind)), None)
    return None if kind is None else "." + kind.split(".")[1]


def find_files(entries: Iterable[Path]) -> list[Path]:
    """The files that the entries of a recipe stand for: files, folders and patterns (``**`` too).

    Each file comes once, at its first mention; what a folder or pattern stands for is sorted.

    Raises:
        UsageError: an entry is missing, of an unknown kind, or stands for no file.
    """
    found: dict[Path, None] = {}
    for entry in entries:
        if is_remote(entry):
            at = files_at(entry)
            below = at if at == [entry] else [path for path in at if kind_of(path)]
            if not below:
                raise UsageError(
                    f"{url_of(entry)!r} stands for no text files.",
                    f"Known kinds: {', '.join(ALL_KINDS)}. Check the address and its bucket.",
                )
        elif entry.is_dir():
            below = sorted(path for path in entry.rglob("*") if path.is_file() and kind_of(path))
            if not below:
                others = sorted(path for path in entry.rglob("*") if path.is_file())
                hints = [hint for path in others[:100] if (hint := conversion(path))]
                raise UsageError(
                    f"The data folder {str(entry)!r} holds no text files.",
                    f"Known kinds: {', '.join(ALL_KINDS)}. {hints[0] if hints else ''}".rstrip(),
                )
        elif glob.has_magic(str(entry)) and not entry.exists():
            names = sorted(glob.glob(str(entry), recursive=True))
            below = [path for path in map(Path, names) if path.is_file()]
            if not below:
                raise UsageError(
                    f"No file matches the pattern {str(entry)!r}.",
                    "Paths are relative to the current folder; ** stands for any depth.",
                )
        else:
            below = [entry]
        check_files(below)
        found |= dict.fromkeys(below)
    return list(found)


def check_files(files: Iterable[Path]) -> None:
    """Raise UsageError for a file that is missing, is no file, or is of an unknown kind."""
    for path in files:
        if kind_of(path) is None:
            raise UsageError(
                f"The data file {str(path)!r} is of an unknown kind.",
                f"Known kinds: {', '.join(ALL_KINDS)}. {conversion(path)}".rstrip(),
            )
        if not is_remote(path) and not path.is_file():
            raise UsageError(
                f"The data file {str(path)!r} does not exist.",
                "Paths are relative to the current folder.",
            )


def read_documents(
    path: Path, text_field: str = "text", messages_field: str | None = None
) -> Iterator[str]:
    """The non-empty documents of one file, in file order.

    Args:
        messages_field: read conversations from it, as JSON (see :mod:`growkit.data.chat`).

    Raises:
        UsageError: the file is not UTF-8, a line is not JSON, or there is no text field.
    """
    if messages_field is not None:
        yield from map(valid_text, _read_conversations(path, messages_field))
        return
    reader = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for text in reader[kind_of(path) or ""](path, text_field):
        if text.strip():
            yield valid_text(text)


def valid_text(text: str) -> str:
    """The text with ``?`` for halves of surrogate pairs, which JSON may hold and UTF-8 may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(open_binary(path), "rb"))
    if suffix == ".zst":
        arrow = import_pyarrow("pyarrow", path)
        source = open_binary(path) if is_remote(path) else str(path)
        return io.BufferedReader(arrow.input_stream(source, compression="zstd"))
    return open_binary(path)


def import_pyarrow(module: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"Reading {str(path)!r} needs pyarrow, which is not installed.",
            "Run: pip install 'growkit[data]'.",
        ) from error


def _read_txt(path: Path, text_field: str) -> Iterator[str]:
    waiting, size = [], 0
    for block in _decoded(path):
        waiting.append(block)
        size += len(block)
        while size > LARGEST:
            text = "".join(waiting)
            cut = text.rfind("\n", 0, LARGEST) + 1 or text.rfind(" ", 0, LARGEST) + 1 or LARGEST
            yield text[:cut]
            waiting, size = [text[cut:]], len(text) - cut
    yield "".join(waiting)


def _decoded(path: Path) -> Iterator[str]:
    """The text in blocks, without a byte order mark, every line ended by a line feed."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    read = 0
    try:
        with _open(path) as file:
            while block := file.read(_BLOCK):
                read += len(block)
                yield lines.decode(block)
            yield lines.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # What the error counts from is the end of what was read.
        raise _not_utf8(path, error, read - len(error.object)) from error
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _read_conversations(path: Path, field: str) -> Iterator[str]:
    kind = kind_of(path)
    if kind == ".jsonl":
        for number, line in _lines(path):
            row = _row_of(line, path, number, field)
            yield conversation_text(row, field, f"{str(path)!r} line {number}")
    elif kind == ".parquet":
        with _table(path, field, "data.messages_field") as table:
            names = [name for name in (field, "tools") if name in table.schema_arrow.names]
            number = 0
            for batch in table.iter_batches(batch_size=128, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield conversation_text(row, field, f"Row {number} of {str(path)!r}")
    else:
        raise UsageError(
            f"{str(path)!r} is plain text, and data.messages_field asks for conversations.",
            "Give .jsonl or .parquet files, or read it as a source of text in a data.mixture.",
        )


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    for number, line in _lines(path):
        yield _text_of(line, path, number, text_field)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with _open(path) as file:
        number = 0
        while True:
            number += 1
            try:
                line = file.readline(LARGEST + 1)
            except _DAMAGE as error:
                raise _damaged(path, error) from error
            if not line:
                return
            if len(line) > LARGEST:
                raise UsageError(
                    f"{str(path)!r} line {number} is longer than {LARGEST >> 20} MiB.",
                    "Give shorter documents, one per line: cut this one into several.",
                )
            if line.strip():
                yield number, line


def _row_of(line: bytes, path: Path, number: int, field: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except (ValueError, RecursionError) as error:
        if number == 1 and line.lstrip().startswith(b"["):
            raise _array(path) from error
        raise UsageError(
            f"{str(path)!r} line {number} is not JSON: {error}.",
            "A .jsonl file holds one JSON object a line.",
        ) from error
    if number == 1 and isinstance(row, list):
        raise _array(path)
    if not isinstance(row, dict):
        raise UsageError(
            f"{str(path)!r} line {number} has no text in field {field!r}: it is no JSON "
            f"object, but {holds(row)}.",
            "A .jsonl file holds one JSON object a line.",
        )
    return row


def _text_of(line: bytes, path: Path, number: int, text_field: str) -> str:
    row = _row_of(line, path, number, text_field)
    if not isinstance(row.get(text_field), str):
        what = f": it holds {holds(row[text_field])}" if text_field in row else ""
        raise UsageError(
            f"{str(path)!r} line {number} has no text in field {text_field!r}{what}.",
            advice(text_field, row, str(path)),
        )
    text: str = row[text_field]
    return text


def _array(path: Path) -> UsageError:
    return UsageError(
        f"{str(path)!r} is one JSON array, and a .jsonl file holds one JSON object a line.",
        conversion(path.with_suffix("") if path.suffix.lower() in COMPRESSED else path),
    )


def _table(path: Path, field: str, key: str) -> Any:
    """A parquet file that has a column."""
    parquet = import_pyarrow("pyarrow.parquet", path)
    try:
        table = parquet.ParquetFile(open_binary(path) if is_remote(path) else path)
    except Exception as error:
        raise UsageError(
            f"{str(path)!r} is not a parquet file: {error}.", "Give a whole .parquet file."
        ) from error
    names = table.schema_arrow.names
    if field not in names:
        table.close()
        raise UsageError(
            f"{str(path)!r} has no column {field!r}.",
            f"{nearest(field, names)}Set {key}; columns: {', '.join(names)}.",
        )
    return table


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    with _table(path, text_field, "data.text_field") as table:
        names = table.schema_arrow.names
        for batch in table.iter_batches(batch_size=128, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                if value is not None and not isinstance(value, str):
                    raise UsageError(
                        f"Column {text_field!r} of {str(path)!r} holds {holds(value)}, not text.",
                        f"{remedy(value, text_field, str(path))} Set data.text_field; columns: "
                        f"{', '.join(names)}.".lstrip(),
                    )
                if value and len(value) > LARGEST:
                    raise UsageError(
                        f"Column {text_field!r} of {str(path)!r} holds a text of {len(value):,} "
                        f"characters, the limit is {LARGEST:,}.",
                        "Cut such documents into several rows.",
                    )
                yield value or ""


def _not_utf8(path: Path, error: UnicodeDecodeError, offset: int = 0) -> UsageError:
    return UsageError(
        f"{str(path)!r} is not UTF-8 text (byte {offset + error.start}: {error.reason}).",
        "Convert it, for example with: iconv -t UTF-8.",
    )


def _damaged(path: Path, error: Exception) -> Exception:
    if system_failed(error):
        return error
    return UsageError(
        f"{str(path)!r} cannot be read to its end: {error}.",
        "The file is cut off or damaged: fetch it again.",
    )
