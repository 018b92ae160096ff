# SPDX-License-Identifier: Apache-2.0
"""Files of a checkpoint folder lie inside it: links lead nowhere else, or are refused by name.

A link out of a folder that was downloaded or unpacked would put ``/etc/passwd`` or a key into the
grown folder, which people upload. Inside means: in the folder's own tree, or, for a snapshot in the
Hub's cache (``models--ORG--NAME/snapshots/COMMIT``), in ``blobs`` of the same repository.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

from growkit.core.errors import CheckpointError

# What growkit or transformers would read of a folder, by lower-case name.
_READ = (
    "*.json", "*.safetensors", "*.py", "*.jinja", "*.model", "*.txt", "*.tiktoken", "vocab.*",
    "bpe.codes", "readme*", "license*", "licence*", "notice*", "copying*", "use_policy*", "*.bin",
    "*.pt", "*.pth", "*.npz", "*.distcp", ".metadata", "tokenizer*", "chat_template*", "*.yaml",
)  # fmt: skip
_ENTERED = ("growkit_optimizer", "optimizer", "optimizer_[0-9]*", "additional_chat_templates")
_REMEDY = "Put a copy in its place if you trust it, or remove the link."


def inside(folder: Path, name: str) -> Path:
    """The real path of a file or subfolder of a checkpoint folder.

    Args:
        name: relative to the folder.

    Raises:
        CheckpointError: it is absolute, climbs by ``..``, or is a link that leads out of the
            folder, in a circle or to nothing.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{name!r} is no file inside {str(folder)!r}.",
            "Do not use this folder: it may come from an untrusted source.",
        )
    root = folder.resolve()
    try:
        real = (folder / path).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
        if (folder / path).is_symlink() or isinstance(error, RuntimeError):
            raise CheckpointError(
                f"{name!r} in {str(folder)!r} is a link to a file that does not exist.",
                "Download the checkpoint again.",
            ) from error
        raise CheckpointError(
            f"{name!r} in {str(folder)!r} cannot be read: {getattr(error, 'strerror', error)}.",
            "Copy or download the checkpoint again.",
        ) from error
    if not any(real.is_relative_to(tree) for tree in (root, *_blobs(root))):
        raise CheckpointError(
            f"{name!r} in {str(folder)!r} is a link to {str(real)!r}, outside of the folder.",
            _REMEDY,
        )
    return real


def _blobs(root: Path) -> list[Path]:
    """Where links of a snapshot (or of a folder in one) in the Hub's cache lead."""
    return [tree.parent / "blobs" for tree in root.parents if tree.name == "snapshots"][:1]


def check_links(folder: Path) -> None:
    """Refuse a folder of which something that growkit or transformers reads leads out of it.

    Raises:
        CheckpointError: naming the link and where it leads.
    """
    for name, entry in _entries(folder, ""):
        if entry.is_symlink() and _matches(entry.name, (*_READ, *_ENTERED)):
            _check(folder, name)
        if _matches(entry.name, _ENTERED) and entry.is_dir():
            for inner, link in _entries(folder, f"{name}/"):
                if link.is_symlink():
                    _check(folder, inner)


def _check(folder: Path, name: str) -> None:
    if (folder / name).exists():  # what a broken link lacks is said where it is needed
        inside(folder, name)


def _entries(folder: Path, below: str) -> list[tuple[str, os.DirEntry[str]]]:
    with os.scandir(folder / below) as entries:
        return [(below + entry.name, entry) for entry in entries]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
