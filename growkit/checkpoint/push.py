# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder as a model of the Hugging Face Hub, by huggingface_hub's own upload."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from growkit.checkpoint.folder import open_checkpoint
from growkit.checkpoint.hub import HUB_ID, not_a_folder
from growkit.checkpoint.links import inside
from growkit.checkpoint.side_files import EXTRA_TEMPLATES
from growkit.core.errors import GrowkitError, UsageError
from growkit.core.names import OPTIMIZER_FOLDER

# What a run leaves beside its model and nobody downloads.
_LEFT_OUT = (".pt", ".pth", ".lock", ".partial", ".bin.index.json")
_TRAINER = {"training_args.bin", "trainer_state.json", "optimizer.bin", "scheduler.bin"}


def files_to_push(folder: Path, name: str, *, optimizer_state: bool = False) -> dict[str, int]:
    """What a push uploads, name -> bytes: the folder's files, not its folders of runs.

    Args:
        name: ``org/name``, or a name alone for the user's own.
        optimizer_state: the folder ``growkit_optimizer`` too.

    Raises:
        UsageError: the name is no Hub id, or there is no such folder.
        CheckpointError: config or weights are missing or cut off, or a link leads out.
    """
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"{name!r} is no name on the Hub.", "Give it as org/name.")
    if not folder.is_dir():
        raise not_a_folder(folder)
    with open_checkpoint(folder):  # every weight file is as long as its header says
        pass
    wanted = [EXTRA_TEMPLATES, *([OPTIMIZER_FOLDER] if optimizer_state else [])]
    if optimizer_state and not (folder / OPTIMIZER_FOLDER).is_dir():
        raise UsageError(
            f"{str(folder)!r} has no {OPTIMIZER_FOLDER}/.", "Leave out --optimizer-state."
        )
    found = {}
    places = [folder, *(folder / name for name in wanted if (folder / name).is_dir())]
    for place in places:
        for path in sorted(place.iterdir()):
            file = path.relative_to(folder).as_posix()
            if path.is_file() and not _left_out(path.name):
                found[file] = os.stat(inside(folder, file)).st_size
    return found


def _left_out(name: str) -> bool:
    return name.startswith(".") or name in _TRAINER or name.endswith(_LEFT_OUT)


def push_folder(
    folder: Path,
    name: str,
    files: Sequence[str],
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> tuple[str, str]:
    """Make the repository where it is not there, and upload the files as one commit.

    Weights that stand there and are not among the files are removed with it. Token and endpoint are
    those of huggingface_hub (``hf auth login``, ``HF_TOKEN``, ``HF_ENDPOINT``).

    Args:
        private: of a new repository; one that is there stays as it is.
        revision: branch, made where it is not there.

    Returns:
        The address of the model, and the commit.

    Raises:
        GrowkitError: the Hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        made = api.create_repo(name, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            revision=revision,
            allow_patterns=list(files),
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
            commit_message=message or f"growkit push {folder.resolve().name}",
        )
    except Exception as error:  # of the Hub, of its client's HTTP library, of the network
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        remedy = "Try again; nothing is committed before everything is uploaded."
        if status in (401, 403):
            remedy = "Log in with: hf auth login (or set HF_TOKEN), with a token that may write."
        raise GrowkitError(f"The Hub did not take {name!r}: {said}.", remedy) from error
    return f"{made}", str(commit.oid)
