"""What a study found: plain data, the content of ``study.json``. No torch.

Losses are in nats per held-out token. FLOPs are training FLOPs: three forward passes per token,
attention included (:mod:`growkit.record.cost`), counted from the first step of the first model,
so a grown model carries what its source cost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from growkit.core.whole_file import write_whole

FORMAT = 1
STUDY_FILE = "study.json"


@dataclass(frozen=True)
class Point:
    """One evaluation of a run; tokens and FLOPs over all its phases."""

    flops: float
    tokens: int
    loss: float


@dataclass(frozen=True)
class Phase:
    """One training run of an arm: from scratch, or on from a grown or converted model.

    Attributes:
        key: content key of the run: recipe, data, and the key of what it continues from.
        change: what was done to the model before it (``signal_heads x2``), or None.
        exactness: what the growth promised and verification found (``exact``), or None.
        parameters: all of them, a tied output projection counted once.
        flops_per_token: of training.
        steps, tokens, flops: of this phase alone.
        learning_rate: its peak.
        seconds: wall time of training and evaluation on one worker.
        first_loss, last_loss: held out, before its first and after its last step.
    """

    key: str
    change: str | None
    exactness: str | None
    parameters: int
    flops_per_token: float
    steps: int
    tokens: int
    flops: float
    learning_rate: float
    seconds: float
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class Run:
    """One arm with one seed, from the first step of the first phase to the end of the budget.

    Attributes:
        curve: evaluations of all phases, by FLOPs.
        measures: other figures of the final model (``bits_per_byte``, ``head_similarity``, ...).
        series: probes of the last phase, name -> [[tokens, value], ...].
    """

    seed: int
    phases: tuple[Phase, ...]
    curve: tuple[Point, ...]
    measures: dict[str, float] = field(default_factory=dict)
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def final_loss(self) -> float:
        """Held-out loss at the end of the budget."""
        return self.phases[-1].last_loss

    @property
    def flops(self) -> float:
        """Spent over all phases."""
        return sum(phase.flops for phase in self.phases)

    @property
    def tokens(self) -> int:
        """Read over all phases."""
        return sum(phase.tokens for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Wall time over all phases."""
        return sum(phase.seconds for phase in self.phases)


@dataclass(frozen=True)
class Sweep:
    """How the learning rate of an arm was chosen.

    Attributes:
        losses: (learning rate, held-out loss) of the trials, ascending; NaN where it diverged.
        chosen: the rate with the lowest loss.
        share: part of the arm's steps that a trial ran.
        seed: of the trials.
    """

    losses: tuple[tuple[float, float], ...]
    chosen: float
    share: float
    seed: int

    @property
    def at_edge(self) -> bool:
        """The best rate is the smallest or largest tried: a better one may lie outside."""
        rates = [rate for rate, _ in self.losses]
        return len(rates) > 1 and self.chosen in (rates[0], rates[-1])


@dataclass(frozen=True)
class Arm:
    """One way to spend the budget.

    Attributes:
        name, label: as in the recipe; the label is for readers.
        from_scratch: the whole budget went into the final model.
        shape: equal for arms whose final models have equal configurations.
        parameters, flops_per_token: of the final model.
        runs: by seed, those that are finished.
        sweep: None where the recipe gives the learning rate.
        failed: seed -> why its run failed (the last line of its log).
    """

    name: str
    label: str
    from_scratch: bool
    shape: str
    parameters: int
    flops_per_token: float
    runs: tuple[Run, ...]
    sweep: Sweep | None = None
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A question that the recipe asks of two arms; ``kind`` says what they have in common."""

    arm: str
    against: str
    kind: str = "equal FLOPs"  # or "equal FLOPs, equal parameters"


@dataclass(frozen=True)
class StudyResult:
    """Everything that tables, plots and the page are made from.

    Attributes:
        budget: training FLOPs of every arm.
        sequences: length of a sequence in tokens.
        held_out_tokens: predicted for every loss.
        machine: ``processor``, ``cores``, ``accelerator``, ``torch``, ``growkit``, ...
        date: of the last finished run, ISO 8601.
        seeds: planned.
        arms: in the order of the recipe.
        comparisons: what is asked, in the order of the recipe.
        target: loss whose FLOPs are compared; None: the final loss of the from-scratch arm of the
            same shape, seed by seed.
        recipe: as it ran.
    """

    name: str
    question: str
    budget: float
    sequence_length: int
    held_out_tokens: int
    machine: dict[str, Any]
    date: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    target: float | None
    recipe: dict[str, Any]

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values; the loss of a trial that diverged, NaN, is null there."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for arm in values["arms"]:
            if arm["sweep"] is not None:
                losses = arm["sweep"]["losses"]
                arm["sweep"]["losses"] = [[a, None if math.isnan(b) else b] for a, b in losses]
        return {"format": FORMAT} | values

    def write(self, folder: Path) -> Path:
        """Write ``study.json``, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        return write_whole(folder / STUDY_FILE, text + "\n")


def result_from(values: Mapping[str, Any]) -> StudyResult:
    """The result that :meth:`StudyResult.to_dict` gave."""
    values = {key: value for key, value in values.items() if key != "format"}
    arms = tuple(_arm(arm) for arm in values.pop("arms"))
    comparisons = tuple(Comparison(**item) for item in values.pop("comparisons"))
    seeds = tuple(values.pop("seeds"))
    return StudyResult(arms=arms, comparisons=comparisons, seeds=seeds, **values)


def _arm(values: Mapping[str, Any]) -> Arm:
    sweep = values.get("sweep")
    return Arm(
        **{
            **values,
            "runs": tuple(_run(run) for run in values["runs"]),
            "sweep": None
            if sweep is None
            else Sweep(
                **{
                    **sweep,
                    "losses": tuple((a, math.nan if b is None else b) for a, b in sweep["losses"]),
                }
            ),
            "failed": {int(seed): why for seed, why in values.get("failed", {}).items()},
        }
    )


def _run(values: Mapping[str, Any]) -> Run:
    return Run(
        seed=values["seed"],
        phases=tuple(Phase(**phase) for phase in values["phases"]),
        curve=tuple(Point(**point) for point in values["curve"]),
        measures=dict(values.get("measures", {})),
        series={
            name: [(a, b) for a, b in pairs] for name, pairs in values.get("series", {}).items()
        },
    )
