"""Optimizer state as every reader presents it: by parameter name, read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.core.errors import CheckpointError

Array = npt.NDArray[Any]

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
MOMENTS = (*FIRST_MOMENTS, *SECOND_MOMENTS)
COUNTER = "step"
METADATA = ".metadata"  # index of a distributed checkpoint
RESET = "Grow without it: --optimizer-state reset."


@dataclass(frozen=True)
class Moment:
    """One state tensor of one parameter.

    Attributes:
        shape: its shape, that of the parameter.
        dtype: safetensors dtype name.
        read: gives the values; possibly a view of a mapped file.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]


@dataclass(frozen=True)
class ParameterState:
    """State of one parameter: its moments by their torch names, and its step counter."""

    moments: Mapping[str, Moment]
    step: float | None = None


@dataclass(frozen=True)
class OptimizerState:
    """State of a whole optimizer.

    Attributes:
        layout: who wrote it (``trainer``, ``accelerate``, ``dcp``, ``growkit`` ...).
        path: file or folder.
        parameters: name -> state; parameters without state are absent.
        groups: plain options of the parameter groups (lr, betas, weight_decay ...).
    """

    layout: str
    path: Path
    parameters: Mapping[str, ParameterState]
    groups: tuple[Mapping[str, Any], ...] = field(default=())

    def stored_files(self) -> list[Path]:
        """The files that it is read from."""
        if self.layout == "dcp":  # several optimizers have several folders
            folders = {self.path, *self.path.parent.glob("optimizer_*/")}
            return [file for folder in folders for file in folder.iterdir()]
        if self.path.is_dir():
            return list(self.path.iterdir())
        return list(self.path.parent.glob(f"optimizer*{self.path.suffix}"))

    @property
    def step(self) -> float | None:
        """The largest step counter."""
        return max((p.step for p in self.parameters.values() if p.step is not None), default=None)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Moments that occur, in the order of :data:`MOMENTS`."""
        found = {name for state in self.parameters.values() for name in state.moments}
        return tuple(name for name in MOMENTS if name in found)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless every state belongs to a parameter of that shape."""
        for name, state in self.parameters.items():
            if name not in shapes:
                raise CheckpointError(
                    f"{self.path.name!r} holds optimizer state of {name!r}, which the checkpoint "
                    "does not have.",
                    "It belongs to another model, or to one whose tensors transformers renames "
                    f"when it loads them (experts stored one by one). {RESET}",
                )
            for kind, moment in state.moments.items():
                if moment.shape != shapes[name]:
                    raise CheckpointError(
                        f"{kind} of {name!r} in {self.path.name!r} has shape {list(moment.shape)}, "
                        f"and the parameter {list(shapes[name])}.",
                        f"The state is of another model, or quantized or factored, which cannot be "
                        f"grown. {RESET}",
                    )


def plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group that JSON can hold, without its parameters."""
    result: dict[str, Any] = {}
    for key, value in group.items():
        if key in ("params", "param_names"):
            continue
        if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
            value = value.item()
        if isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value):
            value = list(value)
        if value is None or isinstance(value, (bool, int, float, str, list)):
            result[key] = value
    return result


def check_kinds(kinds: Mapping[str, Any], name: str, file: str) -> None:
    """Raise CheckpointError for a state entry whose rule of growth is not known."""
    for kind in kinds:
        if kind not in MOMENTS and kind != COUNTER:
            raise CheckpointError(
                f"{file!r} keeps {kind!r} for {name!r}, and growkit knows how to grow only "
                f"{', '.join(MOMENTS)} and {COUNTER}.",
                f"They are what AdamW, Adam, SGD, Lion and Muon keep. {RESET}",
            )


def counter(value: Any) -> float | None:
    """A step counter as a number; None without one."""
    if value is None:
        return None
    return float(np.asarray(value.item() if hasattr(value, "item") else value))
