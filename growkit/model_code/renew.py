# SPDX-License-Identifier: Apache-2.0
"""Renew the model code in a folder that an older growkit wrote; weights are never opened. No torch.

The new files are written and synced beside the old ones first, then renamed into place one by one,
config.json last. A failure puts the old files back. After a kill in between, the same command
finishes the work: what it writes does not depend on what is there.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from growkit.core.errors import UsageError
from growkit.core.json_files import read_json_object
from growkit.core.names import CONFIG
from growkit.core.os_errors import about
from growkit.model_code.exported import MODEL_TYPES, auto_map, code_files

WORK = ".growkit-refresh"


@dataclass(frozen=True)
class Refreshed:
    """What a refresh did.

    Attributes:
        folder: as given.
        model_type: of its config.
        written: names of the files that were replaced or added; empty: the code was current.
    """

    folder: str
    model_type: str
    written: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def refresh_code(folder: Path) -> Refreshed:
    """Bring the model code of ``folder`` to that of this growkit.

    Raises:
        UsageError: no folder whose code growkit writes.
        OSError: a file cannot be written; the old code is in place again.
    """
    config = _own_config(folder)
    model_type = config["model_type"]
    wanted = {name: text.encode("utf-8") for name, text in code_files(model_type).items()}
    if config.get("auto_map") != auto_map(model_type):
        text = json.dumps(config | {"auto_map": auto_map(model_type)}, indent=2) + "\n"
        wanted[CONFIG] = text.encode("utf-8")
    changed = {name: data for name, data in wanted.items() if _content(folder / name) != data}
    work = folder / WORK
    if work.is_dir() and not work.is_symlink():
        shutil.rmtree(work)  # of a refresh that was killed
    if changed:
        with about(folder):
            _replace(folder, work, changed)
    return Refreshed(str(folder), model_type, list(changed))


def _own_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is not a folder.", "Give the folder of a model.")
    config = read_json_object(folder / CONFIG)
    model_type, modules = config.get("model_type"), config.get("auto_map", {})
    # "org/name--module.Class" where the folder came from the Hub
    named = [
        value.rpartition("--")[2].partition(".")[0] if isinstance(value, str) else None
        for value in (modules.values() if isinstance(modules, dict) else [None])
    ]
    ours = {f"{kind}_{model_type}" for kind in ("configuration", "modeling")}
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES or not set(named) <= ours:
        raise UsageError(
            f"The model code of {str(folder)!r} (model_type {model_type!r}) was not written by "
            "growkit.",
            f"Only folders of the types {', '.join(MODEL_TYPES)} hold code that can be renewed.",
        )
    return config


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _replace(folder: Path, work: Path, changed: dict[str, bytes]) -> None:
    """Exchange files; all of them, or none if one cannot be."""
    moved: list[str] = []
    old, new = work / "old", work / "new"
    try:
        for part in (old, new):
            part.mkdir(parents=True)
        for name, data in changed.items():
            if (folder / name).exists():
                shutil.copyfile(folder / name, old / name)
            with (new / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in changed:
            os.replace(new / name, folder / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            if (old / name).exists():
                os.replace(old / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
