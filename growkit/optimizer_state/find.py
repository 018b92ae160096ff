"""Where a checkpoint's optimizer state lies, whoever saved it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from growkit.core.errors import CheckpointError, UsageError
from growkit.core.names import OPTIMIZER
from growkit.optimizer_state.parameter_names import Named, model_parameters
from growkit.optimizer_state.sharded import read_sharded
from growkit.optimizer_state.source import METADATA, RESET, OptimizerState
from growkit.optimizer_state.store import FOLDER, INDEX, read_store
from growkit.optimizer_state.torch_files import read_torch_files
from growkit.record.manifest import read_training_record

LAYOUTS = (
    "growkit_optimizer/ (a grown folder), optimizer.pt (Trainer), optimizer.bin (accelerate, FSDP "
    "full state), optimizer_0/ of torch.distributed.checkpoint (FSDP sharded; another folder has "
    "to be named), or the last checkpoint under training/ (a growkit run)"
)
_DEEPSPEED = re.compile(r"global_step\d+")
_SHARDED = re.compile(r"optimizer(_\d+)?")
_PER_RANK = re.compile(r"optimizer_\d+_rank\d+\.bin|rank\d+-of-\d+-optimizer\.pt")


def find_state(checkpoint: Path, folder: Path | None = None) -> OptimizerState | None:
    """The optimizer state that belongs to a checkpoint folder, opened; None when there is none.

    Args:
        checkpoint: folder of the weights; its config gives the order of parameters.
        folder: where the state lies, when not beside the weights (an accelerate ``save_state``
            folder without config.json, say).

    Raises:
        UsageError: ``folder`` is given and holds none.
        CheckpointError: there is one, and it is damaged or of a kind that cannot be grown.
    """

    @cache
    def parameters() -> Named:
        return model_parameters(checkpoint)

    place = folder or checkpoint
    if not place.is_dir():
        raise UsageError(f"There is no folder {str(place)!r}.", f"It has to hold {LAYOUTS}.")
    for candidate in (place, _last_of_run(place)):
        if candidate is None:
            continue
        state = _in_folder(candidate, parameters)
        if state is not None:
            return state
    if folder is not None:
        raise UsageError(f"{str(folder)!r} holds no optimizer state.", f"It has to hold {LAYOUTS}.")
    return None


def _in_folder(place: Path, parameters: Callable[[], Named]) -> OptimizerState | None:
    if (place / FOLDER / INDEX).is_file():
        return read_store(place / FOLDER)
    if (place / INDEX).is_file() and place.name == FOLDER:
        return read_store(place)
    names = sorted(path.name for path in place.iterdir())
    if OPTIMIZER in names:
        return read_torch_files([place / OPTIMIZER], "trainer", parameters)
    files = [name for name in names if re.fullmatch(r"optimizer(_\d+)?\.bin", name)]
    if files:
        files.sort(key=lambda name: int((re.search(r"\d+", name) or ["0"])[0]))
        return read_torch_files([place / name for name in files], "accelerate", parameters)
    unreadable = [n for n in names if _DEEPSPEED.fullmatch(n) or _PER_RANK.fullmatch(n)]
    if unreadable:
        raise CheckpointError(
            f"{str(place)!r} holds optimizer state in pieces of single processes "
            f"({unreadable[0]!r}), which growkit does not put together.",
            f"Save it as a torch.distributed.checkpoint or a full state dict. {RESET}",
        )
    # Several optimizers have several folders; what other folders hold is not looked at.
    folders = [place / name for name in names if _SHARDED.fullmatch(name)]
    sharded = [path for path in (place, *folders) if _is_file(path, METADATA)]
    states = [state for path in sharded if (state := read_sharded(path)) is not None]
    if not states:
        return None
    merged = {name: s for state in states for name, s in state.parameters.items()}
    groups = tuple(group for state in states for group in state.groups)
    return OptimizerState("dcp", states[0].path, merged, groups)


def _is_file(folder: Path, name: str) -> bool:
    return folder.is_dir() and (folder / name).is_file()


def _last_of_run(place: Path) -> Path | None:
    """The last checkpoint of a finished growkit run, whose weights are those of the folder."""
    try:
        record = read_training_record(place) or {}
    except CheckpointError:
        return None
    step, stages = record.get("steps"), record.get("stages") or 0
    if step is None:
        return None
    run = place / "training" / "stages" / str(stages - 1) if stages else place
    last = run / "training" / "checkpoints" / f"checkpoint-{step}"
    return last if last.is_dir() else None
