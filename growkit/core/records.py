# SPDX-License-Identifier: Apache-2.0
"""What our own JSON files hold, checked by pydantic models where they are read.

A key that a model does not know is left alone: newer versions write more. Pydantic is imported
here, so this module is imported where a file is at hand, not at the start of a command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from growkit.core.errors import CheckpointError, GrowkitError, shown
from growkit.core.files import COPY_AGAIN
from growkit.core.json_files import read_json_object


class Record(BaseModel):
    """Base of the models: exact types (no "1" for 1), unknown keys stay, values do not change."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    remedy: ClassVar[str] = COPY_AGAIN  # what to do about a file that holds something else


Checked = TypeVar("Checked", bound=Record)


def read_record(path: Path, model: type[Checked]) -> Checked:
    """A JSON file as ``model``; NaN and Infinity are numbers in it, as Python writes them.

    Raises:
        CheckpointError: it is not there, not JSON, or holds something else.
    """
    value = read_json_object(path, non_finite=True, remedy=model.remedy)
    return checked(model, value, str(path))


def checked(
    model: type[Checked],
    value: Any,
    file: str,
    *,
    error: type[GrowkitError] = CheckpointError,
    remedy: str | None = None,
) -> Checked:
    """A value that was read from ``file`` as ``model``.

    Raises:
        GrowkitError: (``error``) naming the file, the key and its value.
    """
    try:
        return model.model_validate(value)
    except ValidationError as cause:
        remedy = remedy or model.remedy
        problem = cause.errors(include_url=False)[0]
        key = ".".join(str(step) for step in problem["loc"])[:80]
        if problem["type"] == "missing":
            raise error(f"{file!r} has no {key!r}.", remedy) from None
        given = shown(problem["input"])
        where = f"{key} = {given}" if key else given
        raise error(f"{file!r} holds {where}: {problem['msg']}.", remedy) from None
