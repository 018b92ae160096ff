# SPDX-License-Identifier: Apache-2.0
"""Text files on object storage, by fsspec: ``s3://``, ``gs://``, ``hf://``, whatever is installed.

They are read as streams and never copied; tokens go into the cache as those of local files do. A
file is known by what the store says of its content (ETag, checksum, blob), not by reading it, so a
run that goes on asks for that alone.

A recipe's paths are ``Path`` objects, in which ``s3://a/b`` has become ``s3:/a/b``: :func:`url_of`
undoes that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

from growkit.core.errors import GrowkitError, UsageError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
# What tells the content of an object, in the words of the stores' own libraries.
_CONTENT = ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "blob_id", "checksum")
_LIBRARIES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs",
              "abfs": "adlfs", "abfss": "adlfs"}  # fmt: skip


def is_remote(path: Path) -> bool:
    """Whether a path is an address of fsspec."""
    return _URL.fullmatch(str(path)) is not None


def url_of(path: Path) -> str:
    """The address, or the path of a local file."""
    match = _URL.fullmatch(str(path))
    if match is None:
        return str(path)
    root = "/" if match[1] in ("file", "local") else ""  # which name no host: the path is absolute
    return f"{match[1]}://{root}{match[2]}"


@contextmanager
def _asked(path: Path) -> Iterator[tuple[Any, str]]:
    """The file system of an address and its path there; what goes wrong is a sentence."""
    import fsspec

    url = url_of(path)
    scheme = url.partition(":")[0]
    try:
        yield fsspec.core.url_to_fs(url)
    except (GrowkitError, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise UsageError(
            f"The data file {url!r} does not exist.", "Check the address and its bucket."
        ) from error
    except ImportError as error:
        library = _LIBRARIES.get(scheme, f"the fsspec library of {scheme}://")
        raise UsageError(
            f"Reading {url!r} needs {library}, which is not installed.",
            f"Run: pip install {library}." if scheme in _LIBRARIES else f"{error}.",
        ) from error
    except ValueError as error:
        raise UsageError(
            f"{url!r} cannot be read: {error}.", "fsspec knows s3://, gs://, hf://, https:// ..."
        ) from error
    except Exception as error:  # of as many kinds as there are stores
        said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise GrowkitError(
            f"{url!r} cannot be read: {type(error).__name__}: {said}.",
            f"Credentials and endpoints are those of the library of {scheme}://; try again.",
        ) from error


def files_at(entry: Path) -> list[Path]:
    """The files that an address stands for: itself, those of a folder, or of a pattern; sorted."""
    with _asked(entry) as (system, place):
        if any(sign in place for sign in "*?["):
            found = [name for name in system.glob(place) if system.isfile(name)]
        elif system.isdir(place):
            found = system.find(place)
        else:
            found = [place] if system.isfile(place) else []
        return [Path(system.unstrip_protocol(name)) for name in sorted(found)]


def size_of(path: Path) -> int:
    """Bytes of a file, local or not; 0 where a store does not say."""
    return _remote_size(path) if is_remote(path) else path.stat().st_size


@lru_cache(maxsize=1 << 16)
def _remote_size(path: Path) -> int:
    with _asked(path) as (system, place):
        return int(system.info(place).get("size") or 0)


def content_of(path: Path) -> str:
    """What the store says of the content of a file, with its size."""
    with _asked(path) as (system, place):
        facts = system.info(place)
        told = next((f"{key}:{facts[key]}" for key in _CONTENT if facts.get(key)), None)
        return f"{url_of(path).partition(':')[0]}:{facts.get('size')}:{told or system.ukey(place)}"


def open_binary(path: Path) -> IO[bytes]:
    """A file to read, local or not; one on a store can be sought in."""
    if not is_remote(path):
        return path.open("rb")
    with _asked(path) as (system, place):
        return cast(IO[bytes], system.open(place, "rb"))
