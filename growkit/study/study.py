"""A study from its recipe to its result: what is missing is run, what is there is used. No torch.

What it leaves in OUT, all of it small enough to be committed::

    study.yaml        the recipe as it ran
    study.json        growkit.study.results.StudyResult
    records/KEY.json  every finished training run
    table.md, study.html, figures

and in the folder of runs (default OUT/runs) the trained models and the packed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from growkit.core.errors import UsageError
from growkit.core.progress import Reporter, Silent
from growkit.core.writing import write_whole
from growkit.study.nodes import Node, Nodes, SweepDiverged, Waiting, finished
from growkit.study.race import Race
from growkit.study.recipe import RaceSection, StudyRecipe
from growkit.study.results import Arm, Comparison, Phase, Point, Run, StudyResult
from growkit.study.run_records import Record, Records
from growkit.study.runner import Runner, Slot, slots
from growkit.study.selection import Choice, Line, Planned, outline, planned_runs
from growkit.study.shapes import Shapes
from growkit.study.texts import Inputs, open_inputs

if TYPE_CHECKING:
    from growkit.study.cluster import Cluster

RECIPE = "study.yaml"


class Study:
    """A study in a folder.

    Args:
        recipe: checked.
        out: folder of the results.
        runs: folder of the trained models; several studies may share one.
        reporter: told what continues.
        scratch: what has to be made to know shapes and keys (tokenizer, untrained models) goes
            here instead of ``runs``, and nothing is written elsewhere until :meth:`run`.

    Raises:
        UsageError, CheckpointError: the recipe names what cannot be used, or ``out`` holds
            something else; nothing is written then.
    """

    def __init__(
        self,
        recipe: StudyRecipe,
        out: Path,
        runs: Path,
        reporter: Reporter | None = None,
        *,
        scratch: Path | None = None,
    ) -> None:
        self.recipe, self.out = recipe, out.resolve()
        self.runs = runs.resolve()
        self.reporter = reporter or Silent()
        _claim(self.out, self.runs)
        self.inputs: Inputs = open_inputs(recipe, self.runs, self.reporter, scratch)
        shapes = Shapes(recipe, (scratch or self.runs) / "shapes", self.inputs.tokenizer)
        self.records = Records(self.out / "records", self.runs, copied=scratch is None)
        self.nodes = Nodes(
            recipe,
            shapes,
            self.records,
            self.inputs.fingerprints,
            self.inputs.tokenizer,
            self.runs / "data",
        )
        self.failed: dict[str, str] = {}
        self.race: Race | None = None

    def run(
        self,
        choice: Choice,
        *,
        devices: Sequence[str] = ("auto",),
        workers: int = 1,
        race: bool = False,
        cluster: Cluster | None = None,
    ) -> StudyResult:
        """Make what is missing, and return all that is there.

        ``race``: arms are put out by short runs first (:mod:`growkit.study.race`). ``cluster``:
        runs are jobs of it, ``workers`` at a time.

        A run that fails does not stop the others; ``Arm.failed`` says why it failed.
        """
        self.outline(choice)  # what cannot be run is said before anything is
        self._keep_recipe()
        runner = Runner(
            self.runs,
            self.records,
            slots(devices, workers) if cluster is None else [Slot({}) for _ in range(workers)],
            self.reporter,
            self.recipe.measures,
            self.recipe.series,
            self._write_result,
            submit=None if cluster is None else cluster.start,
        )
        self.failed = runner.failed
        if race:
            self.start_race(choice)
            assert self.race is not None
            runner.run(lambda: self._wanted_in_race(choice), self.race.runs())
            return self.result()
        done, planned = self.progress(choice)
        if done:
            self.reporter.note(f"{done} of {planned} runs are there already.")
        runner.run(lambda: self.wanted(choice), planned - done)
        return self.result()

    def start_race(self, choice: Choice) -> None:
        """The arms of ``choice`` race; :meth:`result` has what came of it so far."""
        section = self.recipe.race or RaceSection()
        self.race = Race(self.nodes, choice, section, self.failed)

    def _wanted_in_race(self, choice: Choice) -> list[Node]:
        assert self.race is not None
        short, survivors = self.race.wanted()
        if survivors is not None:
            return self.wanted(survivors)
        first = (self._first_missing(node) for node in short)
        return list({node.key: node for node in first if node is not None}.values())

    def _write_result(self) -> None:
        self.result().write(self.out)

    def _keep_recipe(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(self.out / RECIPE, yaml.safe_dump(self.recipe.to_dict(), sort_keys=False))

    # -- what is to be done ---------------------------------------------------------------------

    def wanted(self, choice: Choice) -> list[Node]:
        """The runs that could be made now: all arms with the first seed, then with the next."""
        found: dict[str, Node] = {}
        for seed in choice.seeds:
            for arm in choice.arms:
                try:
                    nodes = [self.nodes.node(arm, seed)]
                except Waiting as waiting:
                    nodes = waiting.nodes
                except SweepDiverged as error:
                    self.failed.setdefault(f"rate of {self.nodes.owner(arm)}", error.cause)
                    continue
                for node in nodes:
                    first = self._first_missing(node)
                    if first is not None:
                        found.setdefault(first.key, first)
        return list(found.values())

    def _first_missing(self, node: Node) -> Node | None:
        """The earliest run that a run needs; None where it is made, or cannot be."""
        if self.records.get(node.key) is not None:
            return None
        for before in node.lineage[:-1]:
            if before.key in self.failed:
                self.failed.setdefault(node.key, f"{before.name} failed")
                return None
            record = self.records.get(before.key)
            if record is not None and record.diverged:
                self.failed.setdefault(node.key, f"{before.name} diverged: {record.diverged}")
                return None
            if self.records.trained(before.key) is None or record is None:
                return before
        return node

    def outline(self, choice: Choice) -> list[Line]:
        """What the choice would run.

        Raises:
            UsageError: the budget, or warm-up and decay, do not fit an arm.
        """
        for name in dict.fromkeys(one.name for one in self._planned(choice)):
            self.nodes.check(name)
        return outline(self.nodes, choice.arms)

    def cost(self, choice: Choice) -> float:
        """Training FLOPs of all its runs, those that are there and trials included."""
        return sum(one.flops(self.nodes) for one in self._planned(choice))

    def progress(self, choice: Choice) -> tuple[int, int]:
        """(finished, all) runs of the choice, trials of learning rates included."""
        planned = self._planned(choice)
        return sum(one.is_finished(self.nodes) for one in planned), len(planned)

    def _planned(self, choice: Choice) -> list[Planned]:
        return planned_runs(self.nodes, choice)

    def result(self) -> StudyResult:
        """All finished runs."""
        found = Outcome(self.nodes, self.failed).result(self.out.name)
        return found if self.race is None else replace(found, race=self.race.result())


def _claim(out: Path, runs: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"The output {str(out)!r} is a file.", "Choose a folder with --out.")
    if not out.is_dir() or (out / RECIPE).is_file():
        return
    # A plan, and a study that was refused, leave the folder of runs alone.
    if any(not runs.is_relative_to(path) for path in out.iterdir()):
        raise UsageError(
            f"The output {str(out)!r} is not empty and holds no study.",
            "Choose another folder with --out.",
        )


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
            budget=start.training_flops,
        )

    def _comparisons(self, arms: Sequence[Arm]) -> tuple[Comparison, ...]:
        """What the recipe asks; by default each arm against from-scratch in its shape, and each
        against the first arm."""
        by_name = {arm.name: arm for arm in arms}
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
        return tuple(Comparison(a, b, self._kind(by_name[a], by_name[b])) for a, b in pairs)

    def _kind(self, arm: Arm, against: Arm) -> str:
        """What two arms have in common."""
        whole = self.nodes.lengths.budget
        part = (arm.budget or whole) / (against.budget or whole)
        flops = "equal FLOPs" if part == 1.0 else f"{part:.3g} x its FLOPs"
        return f"{flops}, equal parameters" if arm.shape == against.shape else flops


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
