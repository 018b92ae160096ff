"""From the files of a package to clean text: one function for each source of `corpora.py`.

Every function takes the package's files as ``{name: bytes}`` and returns text. None has a state
or looks at the machine, so the same files always give the same text.
"""

from __future__ import annotations

import html
import io
import json
import re
import sqlite3
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Files = Mapping[str, bytes]
Cleaner = Callable[[Files], str]


def tidy(text: str) -> str:
    """No control characters, no spaces at line ends, at most one empty line in a row."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text).replace("\u00a0", " ")
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def reflow(text: str) -> str:
    """Join the hard-wrapped lines of every paragraph."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(re.sub(r"\s*\n\s*", " ", paragraph).strip() for paragraph in paragraphs)


def in_order(files: Files) -> Iterator[str]:
    """The texts of all files in the order of their names."""
    for name in sorted(files):
        yield files[name].decode("utf-8")


def plain(files: Files) -> str:
    """Texts that need no cleaning, one after another."""
    return "\n\n".join(in_order(files))


def wrapped(files: Files) -> str:
    """Texts with hard-wrapped lines."""
    return "\n\n".join(reflow(text) for text in in_order(files))


def markdown_plays(files: Files) -> str:
    """Plays in Markdown: headings, **SPEAKERS** and _directions_ lose their marks, verse stays."""
    text = "\n\n".join(in_order(files))
    text = re.sub(r"^#+ *", "", text, flags=re.MULTILINE)
    return re.sub(r"\\(.)", r"\1", text.replace("**", "").replace("_", ""))


def r_strings(data: bytes) -> list[str]:
    """One serialised R character vector (XDR, format 2 or 3; R Internals, section 1.8).

    Raises:
        ValueError: `data` holds something else.
    """
    stream = io.BytesIO(data)

    def integer() -> int:
        return int(struct.unpack(">i", stream.read(4))[0])

    if stream.read(2) != b"X\n":
        raise ValueError("not an R object in XDR format")
    version, _, _ = integer(), integer(), integer()
    if version == 3:  # the name of the native encoding follows
        stream.read(integer())
    if integer() & 0xFF != 16:
        raise ValueError("not an R character vector")
    strings = []
    for _ in range(integer()):
        if integer() & 0xFF != 9:
            raise ValueError("an element of an R character vector is no string")
        length = max(integer(), 0)  # -1 marks a missing string
        strings.append(stream.read(length).decode("utf-8"))
    return strings


def r_novels(files: Files) -> str:
    """R's lazy-load database: chunks of 4 bytes length and a zlib stream, each a novel's lines."""
    (database,) = files.values()
    novels = []
    while database:
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(database[4:]))
        database = stream.unused_data
        novels.append(reflow("\n".join(lines)).replace("_", ""))
    return "\n\n".join(novels)


def sqlite_bible(files: Files) -> str:
    """One verse a line, an empty line between chapters; the verse numbers go."""
    (database,) = files.values()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bible.db"
        path.write_bytes(database)
        connection = sqlite3.connect(path)
        try:
            rows = connection.execute(
                "SELECT TestamentID, BookID, ChapterID, Passage1 FROM Bible"
                " ORDER BY TestamentID, BookID, ChapterID, VerseID"
            ).fetchall()
        finally:
            connection.close()
    lines: list[str] = []
    before = None
    for *chapter, passage in rows:
        if before not in (None, chapter):
            lines.append("")
        before = chapter
        # a row may hold several verses, each behind its number
        lines += [verse.strip() for verse in re.split(r"\d+:\d+ ", passage) if verse.strip()]
    return "\n".join(lines)


def osis_text(markup: str) -> str:
    """OSIS as SWORD modules hold it: one paragraph or line of verse a line, no notes."""
    # a note stands in the place of the space between two words
    text = re.sub(r"<note\b.*?</note>", " ", markup, flags=re.DOTALL)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"<chapter\b[^>]*>", "\f", text)
    text = re.sub(r'<div\b[^>]*"x-milestone"[^>]*>', "", text)  # may stand within a sentence
    text = re.sub(r"</?(div|title|lg|l|lb|p|item)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    text = re.sub(r" +([.,;:?!)\u2019\u201d])", r"\1", re.sub(r" {2,}", " ", text))
    text = re.sub(r" *\n[ \n]*", "\n", text)
    return re.sub(r"\s*\f\s*", "\n\n", text)


def sword_bible(files: Files) -> str:
    """SWORD zText: `.bzs` lists (offset, size, unpacked size) of the zlib blocks in `.bzz`."""
    books = []
    for testament in ("ot", "nt"):
        index = next(data for name, data in files.items() if name.endswith(f"/{testament}.bzs"))
        blocks = next(data for name, data in files.items() if name.endswith(f"/{testament}.bzz"))
        for offset, size, _ in struct.iter_unpack("<3I", index):
            books.append(osis_text(zlib.decompress(blocks[offset : offset + size]).decode("utf-8")))
    return "\n\n".join(books)


def untagged(paragraph: str) -> str:
    """A paragraph of word/tag pairs as it would be printed."""
    words: list[str] = []
    joined = True  # whether the next word follows without a space
    quoted = False
    for pair in paragraph.split():
        word = pair.rsplit("/", 1)[0]
        last = words[-1] if words else ""
        if (word in (";", ":", "?", "!") and word == last) or (word == "." and last[-1:] == "."):
            continue  # the corpus doubles these marks, and ends "Jr." with a stop of its own
        if word == "'":
            quoted = not quoted
        opens = word in ("``", "(", "[") or (word == "'" and quoted)
        closes = word in (".", ",", ";", ":", "?", "!", ")", "]", "''") or (
            word == "'" and not quoted
        )
        if not (joined or closes):
            words.append(" ")
        words.append({"``": '"', "''": '"'}.get(word, word))
        joined = opens
    return "".join(words)


def tagged_corpus(files: Files) -> str:
    """Brown: word/tag pairs, paragraphs between empty lines; texts one after another."""
    texts = []
    for text in in_order(files):
        paragraphs = [untagged(paragraph) for paragraph in re.split(r"\n\s*\n", text)]
        texts.append("\n".join(filter(None, paragraphs)))
    return "\n\n".join(texts)


def fields(value: Any, name: str = "") -> Iterator[str]:
    """``name: text`` for every ``{"text": ...}`` inside `value`, depth first."""
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        if key == "text" and isinstance(inner, str):
            text = html.unescape(re.sub(r"<[^>]+>", " ", inner)).replace(" ++ ", "\n")
            text = "\n".join(re.sub(r"\s+", " ", line).strip() for line in text.split("\n"))
            yield f"{name}: {text}" if name else text
        else:
            yield from fields(inner, key)


def factbook(files: Files) -> str:
    """One field a line, an empty line between countries."""
    countries = [json.loads(files[name]) for name in sorted(files) if "/meta/" not in name]
    return "\n\n".join("\n".join(fields(country)) for country in countries)
