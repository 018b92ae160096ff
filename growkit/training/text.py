"""Local text files as documents, and the held-out split.

A .txt file is one document; a .jsonl line and a .parquet row are one document each.

The split never depends on the training seed: a second run on the same data holds out the same text,
so continuing a run under another seed does not train on what the first one was measured on.
Rows are held out whole, by the hash of their text (exact duplicates stay on one side); of a text
file the tail is held out, cut after a line break.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from growkit.errors import UsageError, nearest

KINDS = (".txt", ".jsonl", ".parquet")


def check_files(files: Iterable[Path]) -> None:
    """Raise UsageError for a file that is missing, is no file, or is of an unknown kind."""
    for path in files:
        if path.suffix.lower() not in KINDS:
            raise UsageError(
                f"The data file {str(path)!r} is of an unknown kind.",
                f"Known kinds: {', '.join(KINDS)}.",
            )
        if not path.is_file():
            raise UsageError(
                f"The data file {str(path)!r} does not exist.",
                "Paths are relative to the current folder.",
            )


def read_documents(path: Path, text_field: str = "text") -> Iterator[str]:
    """The non-empty documents of one file, in file order.

    Raises:
        UsageError: the file is not UTF-8, a line is not JSON, or there is no text field.
    """
    reader = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for text in reader[path.suffix.lower()](path, text_field):
        if text.strip():
            yield text


def _read_txt(path: Path, text_field: str) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error) from error
            except ValueError as error:
                raise UsageError(
                    f"{str(path)!r} line {number} is not JSON: {error}.",
                    "A .jsonl file holds one JSON object a line.",
                ) from error
            if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
                keys = list(row) if isinstance(row, dict) else []
                raise UsageError(
                    f"{str(path)!r} line {number} has no text in field {text_field!r}.",
                    f"{nearest(text_field, keys)}Set data.text_field; the fields there are: "
                    f"{', '.join(keys) or 'none'}.",
                )
            yield row[text_field]


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(
            f"Reading {str(path)!r} needs pyarrow, which is not installed.",
            "Run: pip install 'growkit[data]'.",
        ) from error
    try:
        table = parquet.ParquetFile(path)
    except Exception as error:
        raise UsageError(
            f"{str(path)!r} is not a parquet file: {error}.", "Give a whole .parquet file."
        ) from error
    with table:
        names = table.schema_arrow.names
        if text_field not in names:
            raise UsageError(
                f"{str(path)!r} has no column {text_field!r}.",
                f"{nearest(text_field, names)}Set data.text_field; columns: {', '.join(names)}.",
            )
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                if value is not None and not isinstance(value, str):
                    raise UsageError(
                        f"Column {text_field!r} of {str(path)!r} holds "
                        f"{type(value).__name__}, not text.",
                        f"Set data.text_field; columns: {', '.join(names)}.",
                    )
                yield value or ""


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UsageError:
    return UsageError(
        f"{str(path)!r} is not UTF-8 text (byte {error.start}: {error.reason}).",
        "Convert it, for example with: iconv -t UTF-8.",
    )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def cut_tail(text: str, fraction: float) -> tuple[str, str]:
    """Split text into (head, tail); the tail is about ``fraction`` of it and starts a line."""
    cut = round(len(text) * (1 - fraction))
    line_end = text.rfind("\n", 0, cut)
    if line_end > len(text) // 2:
        cut = line_end + 1
    return text[:cut], text[cut:]


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents, read again at every iteration (nothing is kept in memory).

    Args:
        files: training files, or an empty list with ``text`` set.
        text: one text instead of files (the built-in sample).
        eval_files: held-out files; then nothing is held out of ``files``.
    """

    files: list[Path]
    text_field: str = "text"
    eval_fraction: float = 0.05
    eval_files: list[Path] = field(default_factory=list)
    text: str | None = None

    def __post_init__(self) -> None:
        check_files([*self.files, *self.eval_files])
        both = {path.resolve() for path in self.files} & {p.resolve() for p in self.eval_files}
        if both:
            raise UsageError(
                f"{str(min(both))!r} is in data.files and in data.eval_files.",
                "Held-out text must not be trained on: leave it out of one of them.",
            )

    def train_documents(self) -> Iterator[str]:
        """The documents to train on."""
        return self._documents(held_out=False)

    def eval_documents(self) -> Iterator[str]:
        """The held-out documents."""
        if self.eval_files:
            return (d for path in self.eval_files for d in read_documents(path, self.text_field))
        return self._documents(held_out=True)

    def _documents(self, held_out: bool) -> Iterator[str]:
        fraction = 0.0 if self.eval_files else self.eval_fraction
        if fraction == 0.0 and held_out:
            return
        wholes = [p for p in self.files if p.suffix.lower() == ".txt"]
        sources = [self.text] if self.text is not None else []
        for text in (*sources, *(t for p in wholes for t in read_documents(p, self.text_field))):
            yield cut_tail(text, fraction)[held_out] if fraction else text
        rows = [path for path in self.files if path not in wholes]
        limit = self._row_limit(rows) if rows and fraction else None
        for path in rows:
            for text in read_documents(path, self.text_field):
                if (limit is not None and _hash(text) <= limit) == held_out:
                    yield text

    def _row_limit(self, rows: list[Path]) -> int:
        """Rows whose hash is at most this are held out: the asked fraction, at least one row."""
        unique = sorted({_hash(t) for path in rows for t in read_documents(path, self.text_field)})
        if len(unique) < 2:
            raise UsageError(
                f"There are only {len(unique)} different rows to split off a held-out part.",
                "Give data.eval_files, or data.eval_fraction: 0 for none.",
            )
        count = min(max(1, round(self.eval_fraction * len(unique))), len(unique) - 1)
        return unique[count - 1]

    def fingerprint(self) -> str:
        """A hash of the content of all files and of everything that decides the split."""
        digest = hashlib.blake2b(digest_size=16)
        options = [self.text_field, self.eval_fraction, len(self.files), len(self.eval_files)]
        digest.update(json.dumps(options).encode())
        for path in (*self.files, *self.eval_files):
            content = hashlib.blake2b()
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    content.update(block)
            digest.update(path.suffix.lower().encode() + content.digest())
        if self.text is not None:
            digest.update(self.text.encode())
        return digest.hexdigest()
