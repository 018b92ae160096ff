"""The small JSON files of a run folder, each with a model that says what may stand in it.

Whoever reads one gets checked values or one sentence that names the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from growkit.core.records import Record

# More processes than any machine park has; a number beyond it is damage, and is never counted to.
MOST_PROCESSES = 1 << 20
Count = Field(ge=0, lt=1 << 63)


_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})", re.ASCII)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name, -1 for another name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def random_states(processes: int) -> list[str]:
    """Names of the files that hold each process's random numbers."""
    if processes == 1:
        return ["rng_state.pth"]
    return [f"rng_state_{rank}.pth" for rank in range(processes)]


class RunFile(Record):
    """A file of a run: what it holds can be made again."""

    remedy: ClassVar[str] = (
        "Repeat the command with --overwrite to begin anew, or put the file back."
    )


class CheckpointManifest(RunFile):
    """``manifest.json`` of a checkpoint; ``xxh3`` came with format 2."""

    format: Literal[1, 2] = 1
    step: int = Count
    processes: int = Field(1, ge=1, le=MOST_PROCESSES)
    strategy: Literal["ddp", "fsdp"] = "ddp"
    files: dict[str, int]
    xxh3: dict[str, str] = Field(default_factory=dict)

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, int]) -> dict[str, int]:
        for name in files:
            if name.startswith("/") or ".." in name.split("/") or "\0" in name:
                raise ValueError("a file lies outside the checkpoint")
        return files


class RunningLoss(RunFile):
    """``running_loss.json``: the loss since the last log line, of every process."""

    logged_step: int = Count
    losses: list[float] = Field(min_length=1)
    router_sums: list[float] = Field(default_factory=list)  # see growkit.training.router_loss
    router_counts: list[int] = Field(default_factory=list)


class TrainerStateFile(RunFile):
    """What a resume takes from transformers' ``trainer_state.json``."""

    global_step: int = Count
    max_steps: int = Count
    epoch: float | None = None
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0
    total_flos: float = 0.0
    train_batch_size: int | None = None
    logging_steps: float | None = None
    eval_steps: float | None = None
    save_steps: float | None = None
    log_history: list[dict[str, Any]] | None = None
    stateful_callbacks: dict[str, Any] | None = None


class RunRecord(RunFile):
    """``growkit_training.json``: what a finished run came to. Losses in nats per token."""

    steps: int = Count
    tokens: int = Count
    parameters: int = Count
    loss: float | None
    eval_loss: float | None
    perplexity: float | None
    bits_per_byte: float | None


class StageStop(RunFile):
    """``stop.json``: the step at which a stage ends."""

    step: int = Count


class MetricsLine(RunFile):
    """A line of ``metrics.jsonl``: what is reckoned with; losses in nats per token."""

    step: int = Count
    tokens: int = Count
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    change: dict[str, list[Any]] | None = None  # see growkit.training.change_point

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, values: Any) -> Any:
        # A key that is there has a number: readers look for the key alone.
        for key in ("loss", "eval_loss"):
            if isinstance(values, dict) and values.get(key, 0) is None:
                raise ValueError(f"{key} is null")
        return values
