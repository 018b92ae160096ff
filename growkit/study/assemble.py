"""What the finished runs of a study say: records become a result. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from growkit.study.nodes import Nodes, SweepDiverged, Waiting, finished
from growkit.study.records import Record
from growkit.study.results import Arm, Comparison, Phase, Point, Run, StudyResult

EQUAL_FLOPS, EQUAL_PARAMETERS = "equal FLOPs", "equal FLOPs, equal parameters"


class Outcome:
    """Collects the runs of a study.

    Args:
        nodes: its runs and their records.
        failed: key -> why a run failed, of runs that have no record.
    """

    def __init__(self, nodes: Nodes, failed: Mapping[str, str]) -> None:
        self.nodes, self.recipe, self.records = nodes, nodes.study, nodes.records
        self.failed = failed

    def result(self, name: str) -> StudyResult:
        """All finished runs."""
        arms = tuple(self._arm(name) for name in self.recipe.arms)
        records = [record for arm in arms for record in self._records_of(arm.name)]
        newest = max(records, key=lambda record: record.date, default=None)
        return StudyResult(
            name=name,
            question=self.recipe.question,
            budget=self.nodes.lengths.budget,
            sequence_length=self.recipe.data.sequence_length,
            held_out_tokens=newest.held_out_tokens if newest is not None else 0,
            machine=newest.machine if newest is not None else {},
            date=newest.date if newest is not None else "",
            seeds=tuple(self.recipe.seeds),
            arms=arms,
            comparisons=self._comparisons(arms),
            target=self.recipe.target_loss,
            recipe=self.recipe.to_dict(),
        )

    def _records_of(self, arm: str) -> list[Record]:
        found = []
        for seed in self.recipe.seeds:
            try:
                found += finished(self.records, self.nodes.node(arm, seed)) or []
            except (Waiting, SweepDiverged):
                continue
        return found

    def _arm(self, name: str) -> Arm:
        start, shape = self.recipe.arms[name], self.nodes.shapes.of(name)
        runs, failed = [], {}
        try:
            sweep = self.nodes.sweep(name)
        except (Waiting, SweepDiverged):
            sweep = None
        for seed in self.recipe.seeds:
            try:
                node = self.nodes.node(name, seed)
            except SweepDiverged as error:
                failed[seed] = error.cause
                continue
            except Waiting as waiting:
                lost = [one for one in waiting.nodes if one.key in self.failed]
                if lost:
                    failed[seed] = f"{lost[0].name} failed: {self.failed[lost[0].key]}"
                continue
            records = finished(self.records, node)
            if node.key in self.failed:
                failed[seed] = self.failed[node.key]
            elif records is not None and records[-1].diverged:
                failed[seed] = records[-1].diverged
            elif records is not None:
                runs.append(_run(seed, records))
        return Arm(
            name=name,
            label=start.label or name,
            from_scratch=start.from_scratch,
            shape=shape.key,
            parameters=shape.parameters,
            flops_per_token=shape.flops_per_token,
            runs=tuple(runs),
            sweep=sweep,
            failed=failed,
        )

    def _comparisons(self, arms: Sequence[Arm]) -> tuple[Comparison, ...]:
        """What the recipe asks; by default each arm against from-scratch in its shape, and each
        against the first arm."""
        shapes = {arm.name: arm.shape for arm in arms}
        pairs = [(question.arm, question.against) for question in self.recipe.compare]
        if not pairs:
            scratch = {arm.shape: arm.name for arm in reversed(arms) if arm.from_scratch}
            pairs = [
                (arm.name, scratch[arm.shape])
                for arm in arms
                if not arm.from_scratch and arm.shape in scratch
            ]
            first = arms[0].name
            pairs += [(a.name, first) for a in arms[1:] if (a.name, first) not in pairs]
        return tuple(
            Comparison(a, b, EQUAL_PARAMETERS if shapes[a] == shapes[b] else EQUAL_FLOPS)
            for a, b in pairs
        )


def _run(seed: int, records: Sequence[Record]) -> Run:
    phases, curve = [], []
    flops, tokens = 0.0, 0
    for record in records:
        phases.append(
            Phase(
                key=record.key,
                change=record.change,
                exactness=record.exactness,
                parameters=record.parameters,
                flops_per_token=record.flops_per_token,
                steps=record.steps,
                tokens=record.tokens,
                flops=record.tokens * record.flops_per_token,
                learning_rate=record.learning_rate,
                seconds=record.seconds,
                first_loss=record.first_loss,
                last_loss=record.last_loss,
            )
        )
        curve += [
            Point(flops + at * record.flops_per_token, tokens + at, loss)
            for at, loss in record.curve
        ]
        flops += record.tokens * record.flops_per_token
        tokens += record.tokens
    return Run(seed, tuple(phases), tuple(curve), records[-1].measures, records[-1].series)
