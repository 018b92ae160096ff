"""``growkit study --race``: candidates are halved by short runs, the survivors run to the budget.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943) over the arms of a study: every arm
runs ``shares[0]`` of the steps that its budget leaves it, with a decay of its own and the first
seed; the better half runs ``shares[1]``, and so on; what is left, two at least, runs the whole
study with all its seeds. A short run is a run like any other, found again by its content key.

Short runs misjudge (arXiv 2604.04281: which warm start is best depends on the regime), so the
result says how often their order was that of the final losses. Pairs are counted whose two arms
both ran to the budget with the race's seed: survivors, and arms that an earlier study had finished.
No torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

from growkit.core.errors import GrowkitError, UsageError
from growkit.core.quantities import percent
from growkit.study.nodes import Node, Nodes, SweepDiverged, Waiting, finished
from growkit.study.recipe import RaceSection
from growkit.study.results import RaceResult, Rung
from growkit.study.selection import Choice


class Race:
    """The race of a study's arms.

    Args:
        choice: the candidates, and the seeds of the runs to the budget.
        failed: key -> why, of runs that have no record; filled in while the race is run.

    Raises:
        UsageError: fewer candidates than may survive, or a short run of less than one step.
    """

    def __init__(
        self, nodes: Nodes, choice: Choice, section: RaceSection, failed: Mapping[str, str]
    ) -> None:
        self.nodes, self.choice, self.section, self.failed = nodes, choice, section, failed
        if len(choice.arms) <= section.survivors:
            raise UsageError(
                f"--race has {len(choice.arms)} candidates, and {section.survivors} survive.",
                "Add arms, or run the study without --race.",
            )
        for share in section.shares:
            for arm in choice.arms:
                nodes.check(arm, share)

    @property
    def seed(self) -> int:
        """Of the short runs."""
        return self.choice.seeds[0]

    def wanted(self) -> tuple[list[Node], Choice | None]:
        """(short runs that are missing, None), or (none, what runs to the budget)."""
        rungs, missing = self._rungs()
        if missing:
            return missing, None
        return [], Choice(rungs[-1].kept, self.choice.seeds)

    def runs(self) -> int:
        """How many there will be at most, trials of rates left out."""
        arms = len(self.choice.arms)
        total = len(self._bases()) * len(self.choice.seeds)
        for _ in self.section.shares:
            if arms > self.section.survivors:
                total += arms
                arms = self._survivors(arms)
        return total + arms * len(self.choice.seeds)

    def _bases(self) -> set[str]:
        found: set[str] = set()
        for arm in self.choice.arms:
            base = self.nodes.study.start(arm).base
            while base is not None:
                found.add(base)
                base = self.nodes.study.start(base).base
        return found

    def result(self) -> RaceResult:
        """The rungs so far, and how often their order was the final one."""
        rungs, _ = self._rungs()
        return RaceResult(self.seed, tuple(rungs), self._agreement(rungs))

    def _survivors(self, count: int) -> int:
        return max(math.ceil(count / 2), self.section.survivors)

    def _rungs(self) -> tuple[list[Rung], list[Node]]:
        """Finished rungs, and the runs that the next one waits for."""
        arms = self.choice.arms
        rungs: list[Rung] = []
        for share in self.section.shares:
            if len(arms) <= self.section.survivors:
                break  # nothing is left to choose
            losses, missing = self._losses(arms, share)
            if missing:
                return rungs, missing
            order = sorted(arms, key=lambda arm: losses[arm])
            good = [arm for arm in order if math.isfinite(losses[arm])]
            kept = set(good[: self._survivors(len(arms))])
            if not kept:
                raise GrowkitError(
                    f"No candidate of the race has a loss after {percent(share)} of its steps.",
                    "Give smaller learning rates; the logs of the runs say more.",
                )
            arms = tuple(arm for arm in arms if arm in kept)
            shown = {arm: loss for arm, loss in losses.items() if math.isfinite(loss)}
            rungs.append(Rung(share, shown, arms))
        return rungs, []

    def _losses(self, arms: Sequence[str], share: float) -> tuple[dict[str, float], list[Node]]:
        """Held-out losses at the ends of short runs (infinite: no result), and what is missing."""
        losses = dict.fromkeys(arms, math.inf)
        missing: dict[str, Node] = {}
        for arm in arms:
            try:
                node = self.nodes.short(arm, self.seed, share)
            except Waiting as waiting:
                missing |= {one.key: one for one in waiting.nodes if one.key not in self.failed}
                continue
            except SweepDiverged:
                continue
            record = self.nodes.records.get(node.key)
            if record is not None:
                loss = record.last_loss
                losses[arm] = math.inf if math.isnan(loss) else loss
            elif not any(one.key in self.failed for one in node.lineage):
                missing[node.key] = node
        return losses, list(missing.values())

    def _final(self, arms: Collection[str]) -> dict[str, float]:
        """Final losses of the arms that ran to the budget with the race's seed."""
        found = {}
        for arm in arms:
            try:
                records = finished(self.nodes.records, self.nodes.node(arm, self.seed))
            except (Waiting, SweepDiverged):
                continue
            if records and math.isfinite(records[-1].last_loss):
                found[arm] = records[-1].last_loss
        return found

    def _agreement(self, rungs: Sequence[Rung]) -> tuple[tuple[int, int], ...]:
        """(pairs in the final order, all pairs that can be judged) of every rung."""
        final = self._final(self.choice.arms)
        counts = []
        for rung in rungs:
            pairs = list(combinations([arm for arm in rung.losses if arm in final], 2))
            agreed = sum(
                (rung.losses[a] < rung.losses[b]) == (final[a] < final[b]) for a, b in pairs
            )
            counts.append((agreed, len(pairs)))
        return tuple(counts)


def race_lines(race: RaceResult, labels: Mapping[str, str]) -> list[str]:
    """The race in words, a line a rung, and what its short runs were worth."""
    lines = []
    for rung in race.rungs:
        order = sorted(rung.losses, key=lambda arm: rung.losses[arm])
        ranked = ", ".join(f"{labels.get(arm, arm)} {rung.losses[arm]:.4f}" for arm in order)
        out = [labels.get(arm, arm) for arm in rung.losses if arm not in rung.kept]
        lines.append(
            f"After {percent(rung.share)} of the steps (seed {race.seed}): {ranked}; out: "
            f"{', '.join(out) or 'none'}."
        )
    for rung, (agreed, pairs) in zip(race.rungs, race.agreement, strict=True):
        lines.append(
            f"The order after {percent(rung.share)} of the steps was the final one in {agreed} of "
            f"{pairs} pairs that ran to the budget."
            if pairs
            else f"Whether the order after {percent(rung.share)} of the steps is the final one is "
            "not known: no two of its arms ran to the budget."
        )
    lines.append(
        "What was put out did not run to the budget: a short run misjudges what starts slowly."
    )
    return lines
