"""Whether the state in a checkpoint can be read and taken up; nothing of a run is changed here.

Checksums say that a file is as it was written. A checkpoint of format 1 has none, and one that was
edited has them too, so what a resume would load is tried on throw-away objects first.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import CheckpointError, GrowkitError
from growkit.core.files import require_regular
from growkit.core.names import OPTIMIZER, SCHEDULER, TRAINER_STATE
from growkit.core.records import read_record
from growkit.training.adapters import check_adapter, has_adapter
from growkit.training.run_files import (
    CheckpointManifest,
    RunningLoss,
    TrainerStateFile,
    random_states,
    step_of,
)

OPTIMIZER, SCHEDULER = OPTIMIZER, SCHEDULER
STATE, RUNNING_LOSS = TRAINER_STATE, "running_loss.json"
# Length of the state of Mersenne Twister; numpy does not check the position in it.
TWISTER = 624


def load_state(path: Path) -> Any:
    """What torch.save wrote: tensors (the optimizer's mapped from the disk), plain values, no code.

    Raises:
        CheckpointError: it is damaged or holds something else.
    """
    try:
        with safe_globals():  # numpy's random state is an array
            large = path.name == OPTIMIZER
            require_regular(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=large)
    except CheckpointError:
        raise
    except Exception as error:  # truncated, no zip, an unknown class: whatever torch raises
        raise CheckpointError(f"{str(path)!r} cannot be read by torch.") from error


def unreadable(checkpoint: Path, manifest: CheckpointManifest) -> str | None:
    """Why the state in a checkpoint cannot be taken up, or None.

    The optimizer's moments are compared with the parameters when the model is there
    (:mod:`growkit.training.moments`).
    """
    try:
        if manifest.strategy == "ddp":
            content = load_state(checkpoint / OPTIMIZER)
            if not (isinstance(content, Mapping) and {"state", "param_groups"} <= content.keys()):
                return f"{OPTIMIZER} is not the state of an optimizer"
        if not _is_schedule(load_state(checkpoint / SCHEDULER)):
            return f"{SCHEDULER} is not the state of a schedule"
        for name in random_states(manifest.processes):
            if not _is_random_state(load_state(checkpoint / name)):
                return f"{name} is not the state of random numbers"
        if read_record(checkpoint / STATE, TrainerStateFile).global_step != manifest.step:
            return f"{STATE} is not of step {manifest.step}"
        if step_of(checkpoint) not in (manifest.step, -1):
            return f"it is of step {manifest.step}"
        TrainerState.load_from_json(str(checkpoint / STATE))
        if has_adapter(checkpoint):
            check_adapter(checkpoint)
        else:
            with open_checkpoint(checkpoint):  # config and headers of the weights
                pass
        losses = checkpoint / RUNNING_LOSS
        if losses.exists():
            read_record(losses, RunningLoss)
    except TypeError:
        return f"{STATE} is not of this transformers"
    except GrowkitError as error:
        return error.cause.rstrip(".").replace(f"{checkpoint!s}/", "")
    return None


def _is_schedule(content: Any) -> bool:
    if not isinstance(content, Mapping) or not isinstance(content.get("last_epoch"), int):
        return False
    rates = content.get("base_lrs")
    return isinstance(rates, list) and all(isinstance(rate, float | int) for rate in rates)


def _is_random_state(content: Any) -> bool:
    """Tried on generators that nobody uses."""
    try:
        random.Random().setstate(content["python"])
        position = content["numpy"][2]
        np.random.RandomState().set_state(content["numpy"])
        torch.Generator().set_state(content["cpu"])
    except Exception:  # of many kinds: it is given whatever stood in a file
        return False
    return isinstance(position, int) and 0 <= position <= TWISTER
