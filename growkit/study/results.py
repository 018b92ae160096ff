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

from pydantic import TypeAdapter, ValidationError

from growkit.core.errors import CheckpointError, UsageError
from growkit.core.json_files import read_json_object
from growkit.core.writing import write_whole

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
        budget: training FLOPs of its own; None: those of the study.
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
    budget: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A question that the recipe asks of two arms; ``kind`` says what they have in common."""

    arm: str
    against: str
    kind: str = "equal FLOPs"  # or "equal FLOPs, equal parameters", "0.6 x its FLOPs, ..."


@dataclass(frozen=True)
class Rung:
    """One halving of a race.

    Attributes:
        share: part of an arm's steps that its short runs took.
        losses: arm -> held-out loss at the end of its short run; absent: it has none.
        kept: arms that went on.
    """

    share: float
    losses: dict[str, float]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class RaceResult:
    """How ``--race`` chose the arms that ran to the budget.

    Attributes:
        seed: of the short runs.
        agreement: of every rung, (pairs of arms in the order of the final losses, pairs whose two
            arms both ran to the budget).
    """

    seed: int
    rungs: tuple[Rung, ...]
    agreement: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class StudyResult:
    """Everything that tables, plots and the page are made from.

    Attributes:
        budget: training FLOPs of every arm that has none of its own.
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
        race: how arms were put out by short runs; None: they were not.
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
    race: RaceResult | None = None

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def rate_owner(self, name: str) -> str:
        """The base or arm whose learning rate an arm uses: itself, or where ``of`` leads to."""
        seen = [name]
        while (other := self._rate_of(seen[-1])) is not None and other not in seen:
            seen.append(other)
        return seen[-1]

    def _rate_of(self, name: str) -> str | None:
        section = {
            **(self.recipe.get("training") or {}),
            **(start_of(self.recipe, name).get("training") or {}),
        }
        rate = section.get("learning_rate")
        return rate.get("of") if isinstance(rate, dict) else None

    def budget_of(self, arm: Arm) -> float:
        """Training FLOPs of an arm."""
        return self.budget if arm.budget is None else arm.budget

    @property
    def one_budget(self) -> bool:
        """No arm has another budget than the study's."""
        return all(self.budget_of(arm) == self.budget for arm in self.arms)

    def label(self, name: str) -> str:
        """What readers call a base or an arm."""
        labels = {arm.name: arm.label for arm in self.arms}
        return labels.get(name) or start_of(self.recipe, name).get("label") or name

    def sweeps(self) -> dict[str, Sweep]:
        """Base or arm -> the sweep of its own; arms that take the rate of another have none."""
        return {self.rate_owner(arm.name): arm.sweep for arm in self.arms if arm.sweep is not None}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values; the loss of a trial that diverged, NaN, is null there."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if self.race is None:
            del values["race"]
        for arm in values["arms"]:
            if arm["budget"] is None:
                del arm["budget"]
            if arm["sweep"] is not None:
                losses = arm["sweep"]["losses"]
                arm["sweep"]["losses"] = [[a, None if math.isnan(b) else b] for a, b in losses]
        return {"format": FORMAT} | values

    def write(self, folder: Path) -> Path:
        """Write ``study.json``, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        return write_whole(folder / STUDY_FILE, text + "\n")


def start_of(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a recipe says of a base or an arm, as plain values."""
    parts = [recipe.get("arms"), recipe.get("bases")]
    found = (part[name] for part in parts if isinstance(part, dict) and name in part)
    return next((start for start in found if isinstance(start, dict)), {})


def read_result(folder: Path) -> StudyResult:
    """The result that a study left in its folder.

    Raises:
        UsageError: there is none.
        CheckpointError: ``study.json`` is not what a study writes.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        raise UsageError(
            f"There is no study in {str(folder)!r}: it holds no {STUDY_FILE}.",
            "Give the output folder of growkit study.",
        )
    remedy = "Run the study again: it takes what is in records/."
    values = read_json_object(path, remedy=remedy)
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{str(path)!r} has format {values.get('format')!r}.", remedy)
    try:
        return result_from(values)
    except (ValidationError, TypeError, KeyError, AttributeError) as error:
        problem = str(error).splitlines()[0]
        raise CheckpointError(f"{str(path)!r} is no result of a study: {problem}", remedy) from None


def result_from(values: Mapping[str, Any]) -> StudyResult:
    """The result that :meth:`StudyResult.to_dict` gave."""
    values = {key: value for key, value in values.items() if key != "format"}
    return TypeAdapter(StudyResult).validate_python(
        values | {"arms": [arm | {"sweep": _sweep(arm["sweep"])} for arm in values["arms"]]}
    )


def _sweep(values: dict[str, Any] | None) -> dict[str, Any] | None:
    if values is None:
        return None
    losses = [(rate, math.nan if loss is None else loss) for rate, loss in values["losses"]]
    return values | {"losses": losses}
