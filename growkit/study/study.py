"""A study from its recipe to its result: what is missing is run, what is there is used. No torch.

What it leaves in OUT, all of it small enough to be committed::

    study.yaml        the recipe as it ran
    study.json        growkit.study.results.StudyResult
    records/KEY.json  every finished training run
    table.md, study.html, figures

and in the folder of runs (default OUT/runs) the trained models and the packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from growkit.core.errors import UsageError
from growkit.core.progress import Reporter, Silent
from growkit.core.whole_file import write_whole
from growkit.study.assemble import Outcome
from growkit.study.inputs import Inputs, open_inputs
from growkit.study.nodes import Node, Nodes, SweepDiverged, Waiting
from growkit.study.recipe import StudyRecipe
from growkit.study.records import Records
from growkit.study.results import StudyResult
from growkit.study.runner import Runner, slots
from growkit.study.selection import Choice, Line, Planned, outline, planned_runs
from growkit.study.shapes import Shapes

RECIPE = "study.yaml"


class Study:
    """A study in a folder.

    Args:
        recipe: checked.
        out: folder of the results.
        runs: folder of the trained models; several studies may share one.
        reporter: told what goes on.

    Raises:
        UsageError, CheckpointError: the recipe names what cannot be used, or ``out`` holds
            something else; nothing is written then.
    """

    def __init__(
        self, recipe: StudyRecipe, out: Path, runs: Path, reporter: Reporter | None = None
    ) -> None:
        self.recipe, self.out = recipe, out.resolve()
        self.runs = runs.resolve()
        self.reporter = reporter or Silent()
        _claim(self.out, self.runs)
        self.inputs: Inputs = open_inputs(recipe, self.runs, self.reporter)
        shapes = Shapes(recipe, self.runs / "shapes", self.inputs.tokenizer)
        self.records = Records(self.out / "records", self.runs)
        self.nodes = Nodes(
            recipe,
            shapes,
            self.records,
            self.inputs.fingerprints,
            self.inputs.tokenizer,
            self.runs / "data",
        )
        self.failed: dict[str, str] = {}

    def run(
        self, choice: Choice, *, devices: Sequence[str] = ("auto",), workers: int = 1
    ) -> StudyResult:
        """Make what is missing, and return all that is there.

        A run that fails does not stop the others; ``Arm.failed`` says why it failed.
        """
        self.outline(choice)  # what cannot be run is said before anything is
        self._keep_recipe()
        runner = Runner(
            self.runs,
            self.records,
            slots(devices, workers),
            self.reporter,
            self.recipe.measures,
            self.recipe.series,
            self._write_result,
        )
        self.failed = runner.failed
        done, planned = self.progress(choice)
        if done:
            self.reporter.note(f"{done} of {planned} runs are there already.")
        runner.run(lambda: self.wanted(choice), planned - done)
        return self.result()

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
        return Outcome(self.nodes, self.failed).result(self.out.name)


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
