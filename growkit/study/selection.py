"""Which runs of a study are to be made, and what they will come to. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from growkit.core.errors import UsageError, nearest
from growkit.study.nodes import Nodes, SweepDiverged, Waiting
from growkit.study.recipe import StudyRecipe


@dataclass(frozen=True)
class Choice:
    """The part of a study that is run now: arms and seeds in the recipe's order."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]


def choose(recipe: StudyRecipe, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> Choice:
    """All arms and seeds, or those that are named.

    Raises:
        UsageError: an arm or a seed that the recipe does not have.
    """
    for arm in arms:
        if arm not in recipe.arms:
            raise UsageError(
                f"--arms names {arm!r}, which is no arm of the study.",
                f"{nearest(arm, recipe.arms)}Its arms: {', '.join(recipe.arms)}.",
            )
    for seed in seeds:
        if seed not in recipe.seeds:
            raise UsageError(
                f"--seeds names {seed}, which is no seed of the study.",
                f"Its seeds: {', '.join(map(str, recipe.seeds))}.",
            )
    return Choice(
        tuple(arm for arm in recipe.arms if not arms or arm in arms),
        tuple(seed for seed in recipe.seeds if not seeds or seed in seeds),
    )


@dataclass(frozen=True)
class Planned:
    """One run.

    Attributes:
        name: of the base or arm.
        rate: that is tried; None for the run itself.
    """

    name: str
    seed: int
    rate: float | None = None

    def flops(self, nodes: Nodes) -> float:
        """Training FLOPs of this run alone."""
        share = 1.0 if self.rate is None else nodes.study.sweep.share
        return nodes.lengths.steps(self.name, share) * nodes.lengths.flops_per_step(self.name)

    def is_finished(self, nodes: Nodes) -> bool:
        """It has a record."""
        try:
            if self.rate is None:
                node = nodes.node(self.name, self.seed)
            else:
                node = nodes.trial(self.name, self.rate)
        except (Waiting, SweepDiverged):
            return False
        return nodes.records.get(node.key) is not None


def planned_runs(nodes: Nodes, choice: Choice) -> list[Planned]:
    """The runs, each after what it depends on."""
    found: dict[Planned, None] = {}

    def add(name: str, seed: int) -> None:
        owner, trials = nodes.owner(name), nodes.study.sweep
        rates, origin = nodes.rates(owner), nodes.study.start(owner).base
        if isinstance(rates, list):
            if origin is not None:
                add(origin, trials.seed)
            for rate in sorted(map(float, rates)):
                found.setdefault(Planned(owner, trials.seed, rate))
        base = nodes.study.start(name).base
        if base is not None:
            add(base, seed)
        found.setdefault(Planned(name, seed))

    for seed in choice.seeds:
        for arm in choice.arms:
            add(arm, seed)
    return list(found)


@dataclass(frozen=True)
class Line:
    """One base or arm; steps, tokens and FLOPs are of its own run with one seed.

    Attributes:
        origin: what it starts from and what is done to that.
        rate: its learning rate, or how that is chosen.
    """

    name: str
    origin: str
    parameters: int
    flops_per_token: float
    steps: int
    tokens: int
    flops: float
    rate: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def outline(nodes: Nodes, arms: Sequence[str]) -> list[Line]:
    """The bases of some arms, and the arms."""
    study = nodes.study
    names: dict[str, None] = {}
    for arm in arms:
        chain: list[str] = []
        name: str | None = arm
        while name is not None:
            chain.append(name)
            name = study.start(name).base
        for one in reversed(chain):
            names.setdefault(one)
    return [_line(nodes, name) for name in names]


def _line(nodes: Nodes, name: str) -> Line:
    start, shape = nodes.study.start(name), nodes.shapes.of(name)
    steps = nodes.lengths.steps(name)
    origin = start.base or (str(start.checkpoint) if start.checkpoint else "scratch")
    if start.change is not None:
        ((_, values),) = start.change.items()
        origin += ", " + ", ".join(f"{key} {value}" for key, value in values.items())
    rate = nodes.rates(name)
    if isinstance(rate, dict):
        rate = f"that of {rate['of']}"
    elif isinstance(rate, list):
        rate = f"best of {len(rate)}"
    tokens = steps * nodes.lengths.tokens_per_step
    return Line(
        name=name,
        origin=origin,
        parameters=shape.parameters,
        flops_per_token=shape.flops_per_token,
        steps=steps,
        tokens=tokens,
        flops=tokens * shape.flops_per_token,
        rate=str(rate),
    )
