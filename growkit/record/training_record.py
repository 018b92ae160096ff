# SPDX-License-Identifier: Apache-2.0
"""What growkit_training.json has to hold for its readers. Imports pydantic."""

from __future__ import annotations

from typing import Any

from growkit.core.records import Record


class TrainingRecord(Record):
    """The record of a finished run; older versions wrote fewer keys."""

    steps: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    stages: int | None = None
    parameters: int | None = None
    held_out_tokens: int | None = None
    eval_loss: float | None = None
    loss_before_growth: float | None = None
    recipe: dict[str, Any] | None = None
