# SPDX-License-Identifier: Apache-2.0
"""What growkit.json has to hold for its readers. Imports pydantic: imported where a file exists."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from growkit.core.records import Record

Range = list[int]
Parts = dict[str, list[Range]]


class ParentRecord(Record):
    """Who the source was."""

    name: str | None = None
    revision: str | None = None


class CostRecord(Record):
    """Figures of one model."""

    parameters: int | None = None


class PlanRecord(Record):
    """What a growth did."""

    exactness: str | None = None
    before: CostRecord | None = None
    after: CostRecord | None = None


class VerificationRecord(Record):
    """What the verification said."""

    summary: str | None = None


class ManifestRecord(Record):
    """The whole file."""

    format: int = 1
    parent: ParentRecord | None = None
    request: dict[str, Any] | None = None
    plan: PlanRecord | None = None
    new_parameters: dict[str, Literal["all"] | Parts] | None = None
    verification: VerificationRecord | None = None
    lineage: list[Any] = Field(default_factory=list)
