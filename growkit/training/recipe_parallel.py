"""The ``parallel`` section of a recipe: how processes share the work. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from growkit.training.recipe_section import Positive, Section


class ParallelSection(Section):
    """How several processes train one model; the launcher says how many there are.

    The number of processes never changes what a recipe computes: the sequences of a step
    (``per_device_train_batch_size`` x ``gradient_accumulation_steps``) are shared among them.
    """

    # ddp: every process holds the model. fsdp: every process holds a part of it (FSDP2).
    strategy: Literal["ddp", "fsdp"] = "ddp"
    # When given, a launch with any other number of processes is refused.
    processes: Positive | None = None
    # fsdp with bf16: what travels between processes. bfloat16 halves the traffic; every parameter,
    # lambda vectors too, is then rounded where it is used (not where it is stored).
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    # A process that waits longer for another one ends the run.
    timeout_minutes: Annotated[float, Field(gt=0)] = 30
