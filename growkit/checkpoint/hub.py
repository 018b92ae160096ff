"""Sources on the Hugging Face Hub: ``org/name`` becomes a folder in the Hub's own cache.

huggingface_hub is imported only when a source is not a local folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from growkit.core.errors import CheckpointError, GrowkitError, UsageError, nearest
from growkit.core.names import CONFIG, README

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What grow, verify and the model card read; no weights of other formats.
WANTED = (
    "*.safetensors",
    "*.json",
    "*.py",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
    "bpe.codes",
    README,
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)


def not_a_folder(path: Path) -> UsageError:
    if path.exists():
        return UsageError(
            f"{str(path)!r} is a file, not a folder.", "Give the folder that holds config.json."
        )
    siblings: list[str] = []
    if path.parent.is_dir():
        siblings = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
    old = [name for name in siblings if name.startswith(f"{path.name}.old-")]
    if old:
        remedy = f"An interrupted --overwrite left the old folder as {old[0]!r}: rename it back."
    else:
        remedy = nearest(path.name, siblings) + (
            "Give a folder, or the Hub id of a model (org/name), which the commands download."
        )
    return UsageError(f"There is no folder {str(path)!r}.", remedy)


def resolve_source(
    source: Path, revision: str | None = None, *, weights: bool = True, progress: bool = True
) -> Path:
    """The local folder of a source: itself, or the downloaded snapshot of a Hub id.

    A folder that exists always wins. Cache, token, endpoint and ``HF_HUB_OFFLINE`` are those of
    huggingface_hub; without a network the cached snapshot is used.

    Args:
        source: a folder, or ``org/name``.
        revision: branch, tag or commit of a Hub id; default ``main``.
        weights: with False only config.json is downloaded.
        progress: show the Hub's progress bars.

    Raises:
        UsageError: neither a folder nor a model on the Hub, or an unknown revision.
        CheckpointError: the model is gated, or the Hub cannot be reached and the cache has no
            whole copy.
    """
    name = source.as_posix()
    if source.exists() or not HUB_ID.fullmatch(name):
        if revision is not None:
            raise UsageError(
                f"--revision {revision!r} was given for {name!r}, which is no Hub id.",
                "Leave it out; a local folder has no revisions.",
            )
        return source
    return _download(name, revision, list(WANTED) if weights else [CONFIG], progress)


def origin(folder: Path) -> tuple[str, str | None]:
    """(``org/name``, commit) of a folder in the Hub's cache; (folder name, None) of any other."""
    parts = folder.resolve().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/"), parts[-1]
    return folder.resolve().name, None


def _download(name: str, revision: str | None, patterns: list[str], progress: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    silenced = not progress and not are_progress_bars_disabled()
    if silenced:
        disable_progress_bars()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise not_a_folder(Path(name)) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _explained(error, name, revision, bool(constants.HF_HUB_OFFLINE)) from error
    finally:
        if silenced:
            enable_progress_bars()


def _explained(error: Exception, name: str, revision: str | None, offline: bool) -> GrowkitError:
    """One sentence for everything that the Hub can answer."""
    from huggingface_hub import errors

    which = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    parent = Path(name).parent
    # A mistyped folder looks like a Hub id.
    meant = nearest(Path(name).name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"The Hub model {name!r} is gated.",
            f"Accept its terms at huggingface.co/{name} and log in with 'hf auth login'.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(
            f"The Hub model {name!r} has no revision {revision!r}.",
            "Give a branch, a tag or a commit of the model, or leave --revision out.",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(
            f"{name!r} is neither a folder here nor a model that the Hub shows you.",
            f"{meant}Check the name; a private model needs 'hf auth login'.",
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        return CheckpointError(
            f"{name!r} is no folder here, the Hub's cache has no whole copy of {which}, and {why}.",
            meant
            + (
                "Unset HF_HUB_OFFLINE, or give a local folder."
                if offline
                else "Check the network and try again, or give a local folder."
            ),
        )
    reason = str(error).strip().splitlines()
    return CheckpointError(
        f"The Hub model {which} cannot be downloaded: {reason[0] if reason else type(error)}.",
        "Try again, or give a local folder.",
    )
