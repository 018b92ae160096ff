# SPDX-License-Identifier: Apache-2.0
"""What state.json of a stored optimizer state has to hold. Imports pydantic."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from growkit.core.records import Record

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
