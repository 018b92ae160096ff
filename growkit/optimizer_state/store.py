# SPDX-License-Identifier: Apache-2.0
"""What state.json of a stored optimizer state has to hold. Imports pydantic.

Grown optimizer state on disk: safetensors keyed by parameter name.

Layout of ``growkit_optimizer/`` inside a grown checkpoint folder, which is published with it or not
at all::

    state.json               see below
    exp_avg.safetensors      first moments: one tensor a parameter, under the parameter's name
    exp_avg_sq.safetensors   second moments (Muon: momentum_buffer.safetensors alone)

``state.json``: ``format`` 1; ``mode`` (``grow`` or ``reset-new``); ``source`` (layout, file, step,
options of its parameter groups); ``parameters``: name -> ``{"step": 500.0, "moments": [...]}``,
with the moments that the files hold for it; ``roles``: how each kind of tensor was made and whether
that is exact (see :func:`growkit.optimizer_state.write.describe`). A parameter that is not listed
begins without state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, FiniteFloat

from growkit.checkpoint import DTYPES, read_header
from growkit.checkpoint.reading import byte_view, read_exactly
from growkit.core.errors import CheckpointError
from growkit.core.files import open_regular
from growkit.core.json_files import read_json_object
from growkit.core.names import OPTIMIZER_FOLDER
from growkit.core.records import Record
from growkit.core.writing import write_file
from growkit.optimizer_state.source import MOMENTS, Array, Moment, OptimizerState, ParameterState

Step = Annotated[FiniteFloat, Field(ge=0, le=2**53)]


class ParameterRecord(Record):
    """State of one parameter: its step counter, and the moments that the files hold for it."""

    moments: list[str]
    step: Step | None = None


class SourceRecord(Record):
    """Where the state came from, and the plain options of its parameter groups."""

    groups: list[dict[str, Any]] = Field(default_factory=list)


class RoleRecord(Record):
    """How one kind of tensor was made."""

    moments: str


class StoreRecord(Record):
    """See :mod:`growkit.optimizer_state.store`."""

    parameters: dict[str, ParameterRecord]
    source: SourceRecord
    roles: dict[str, RoleRecord | list[RoleRecord]] = Field(default_factory=dict)


FOLDER = OPTIMIZER_FOLDER
INDEX = "state.json"
FORMAT = 1
GROW_AGAIN = "Grow the checkpoint again, or without it: --optimizer-state reset."


def index_of(folder: Path) -> dict[str, Any]:
    """``state.json`` of a ``growkit_optimizer`` folder."""
    path = folder / INDEX
    try:
        content = read_json_object(path, non_finite=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"The optimizer state cannot be read: {error.cause}", GROW_AGAIN
        ) from error
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{str(path)!r} has format {content.get('format')!r}, and this growkit reads {FORMAT}.",
            "Grow the checkpoint again with this version.",
        )
    from growkit.core.records import checked

    # Every key that the model knows is there, with what it stands for when it was left out.
    return checked(StoreRecord, content, str(path), remedy=GROW_AGAIN).model_dump()


def read_store(folder: Path) -> OptimizerState:
    """The state in a ``growkit_optimizer`` folder, read tensor by tensor when asked for.

    Raises:
        CheckpointError: files are missing or do not belong together.
    """
    index = index_of(folder)
    found: dict[str, dict[str, Moment]] = {name: {} for name in index["parameters"]}
    for kind in MOMENTS:
        path = folder / f"{kind}.safetensors"
        if not path.is_file():
            continue
        for name, info in read_header(path).tensors.items():
            read = partial(_read, path, info.start, info.shape, info.dtype)
            found.setdefault(name, {})[kind] = Moment(info.shape, info.dtype, read)
    for name, moments in found.items():
        listed = index["parameters"].get(name, {}).get("moments")
        if listed is None or sorted(listed) != sorted(moments):
            raise CheckpointError(
                f"{str(folder)!r} lists {listed} for {name!r} and holds {sorted(moments)}.",
                "Files of two saves are mixed: grow the checkpoint again.",
            )
    return OptimizerState(
        "growkit",
        folder,
        {n: ParameterState(m, index["parameters"][n]["step"]) for n, m in found.items()},
        tuple(index["source"].get("groups", ())),
    )


def _read(path: Path, start: int, shape: tuple[int, ...], dtype: str) -> Array:
    kind = DTYPES[dtype].numpy
    array: Array = np.empty(shape, kind)
    with open_regular(path) as file:
        view = byte_view(array)
        if read_exactly(file.fileno(), view, start) != len(view):
            raise CheckpointError(f"{str(path)!r} is truncated.", "Grow the checkpoint again.")
    return array


def write_index(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``state.json``."""
    text = json.dumps({"format": FORMAT, **content}, indent=1, ensure_ascii=False)
    write_file(folder / INDEX, text + "\n")


def as_stored(content: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`index_of` reads of it."""
    stored: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **content}))
    return stored


__all__ = ["FOLDER", "INDEX", "as_stored", "index_of", "read_store", "write_index"]
