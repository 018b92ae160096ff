"""A file that is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(target: Path, content: str | bytes) -> Path:
    """Write beside ``target`` and rename: after a kill the old file or the new one is there."""
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(partial, target)
    return target
