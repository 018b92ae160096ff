"""All runs that a choice of arms and seeds needs, also those whose learning rate is unknown yet."""

from __future__ import annotations

from dataclasses import dataclass

from growkit.study.choice import Choice
from growkit.study.nodes import Nodes, SweepDiverged, Waiting


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
