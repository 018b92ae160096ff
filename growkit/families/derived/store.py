"""Where derived tables are: made in this process, in the user's cache, shipped."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from growkit.core.json_files import read_json_object
from growkit.families.derived.form import FORMAT, MAX_BYTES

SHIPPED = Path(__file__).parents[1] / "derived_tables"
_registered: list[dict[str, Any]] = []


def cache_folder() -> Path:
    """Where tables that were derived here are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "growkit" / "derived"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "growkit" / "derived"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "growkit" / "derived"
    return Path.home() / ".cache" / "growkit" / "derived"


def file_stem(model_type: str) -> str:
    """The model type as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", model_type)[:80]


def tables_of(model_type: str) -> Iterator[dict[str, Any]]:
    """Tables of a model type: made in this process, in the user's cache, shipped."""
    yield from registered_tables(model_type)
    for folder in (cache_folder(), SHIPPED):
        if folder.is_dir():
            for path in sorted(folder.glob(f"{file_stem(model_type)}-*.json")):
                table = _read(path)
                if table.get("format") == FORMAT and table.get("model_type") == model_type:
                    yield table


def registered_tables(model_type: str) -> Iterator[dict[str, Any]]:
    """Tables of a model type that were made in this process."""
    yield from (table for table in _registered if table["model_type"] == model_type)


@lru_cache(maxsize=64)
def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path, limit=MAX_BYTES)


def register(table: dict[str, Any]) -> None:
    """Use a table in this process, before any other of its type."""
    _registered.insert(0, table)


def forget(table: dict[str, Any]) -> None:
    """Undo :func:`register`."""
    _registered[:] = [known for known in _registered if known is not table]


@lru_cache(maxsize=1)
def shipped_types() -> tuple[str, ...]:
    """Model types with a shipped table."""
    return tuple(sorted({path.name.rpartition("-")[0] for path in SHIPPED.glob("*.json")}))
