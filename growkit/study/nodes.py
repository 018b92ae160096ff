"""The training runs of a study, each under a key that says everything its result depends on.

A run is one phase of one arm with one seed (or of a base, or a trial of a learning rate). Runs that
are the same are made once: arms share their base, and studies share what they have in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from growkit.core.errors import UsageError
from growkit.core.quantities import percent
from growkit.study.recipe import Start, StudyRecipe
from growkit.study.results import Sweep
from growkit.study.run_records import Record, Records
from growkit.study.shapes import Lengths, Shape, Shapes
from growkit.study.texts import content_key
from growkit.training.read_recipe import make_recipe

# Steps of a schedule that may be given as a part of the whole: here, of the budget's FLOPs.
PARTS = ("decay_steps",)
LOGGED = 50


class SweepDiverged(UsageError):
    """No learning rate of a base or an arm can be used; the others are not concerned."""


class Waiting(Exception):
    """What is asked for depends on runs that are not finished."""

    def __init__(self, nodes: list[Node]) -> None:
        super().__init__(f"waiting for {len(nodes)} runs")
        self.nodes = nodes


@dataclass(frozen=True)
class Node:
    """One training run.

    Attributes:
        name: for people: arm, seed, and what it is a trial of.
        start: what the recipe says of it.
        seed: of initialisation and order.
        parent: the run that it continues from, or None.
        shape: of its model.
        recipe: a training recipe without ``model.checkpoint`` where it continues from something.
        first_step: steps before it, those of its parents.
        key: content key.
    """

    name: str
    start: Start
    seed: int
    parent: Node | None
    shape: Shape
    recipe: dict[str, Any]
    first_step: int
    key: str

    @property
    def steps(self) -> int:
        """Of this run alone."""
        return int(self.recipe["training"]["max_steps"]) - self.first_step

    @property
    def lineage(self) -> list[Node]:
        """This run and all before it, the first one first."""
        return [*(self.parent.lineage if self.parent is not None else []), self]


class Nodes:
    """Finds the run of an arm and a seed, once what it depends on is known.

    Args:
        records: of finished runs.
        fingerprints: what the content keys say of data and tokenizer.
        tokenizer: folder of the study's tokenizer, or None.
        cache: folder of the packed tokens.
    """

    def __init__(
        self,
        study: StudyRecipe,
        shapes: Shapes,
        records: Records,
        fingerprints: Mapping[str, str],
        tokenizer: Path | None,
        cache: Path,
    ) -> None:
        self.study, self.shapes, self.records = study, shapes, records
        self.lengths = Lengths(study, shapes)
        self.fingerprints, self.tokenizer, self.cache = fingerprints, tokenizer, cache

    def node(self, name: str, seed: int) -> Node:
        """The run of a base or an arm.

        Raises:
            Waiting: a learning rate is not chosen yet.
            SweepDiverged: no learning rate can be used.
            UsageError: nothing is left of the budget.
        """
        return self._node(name, seed, self.learning_rate(name))

    def learning_rate(self, name: str) -> float:
        """The peak rate of a base or an arm.

        Raises:
            Waiting: for trials of it.
        """
        rate = self.rates(self.owner(name))
        if not isinstance(rate, list):
            return float(rate)
        sweep = self.sweep(name)
        assert sweep is not None
        return sweep.chosen

    def rates(self, name: str) -> Any:
        """What the recipe says: a number, a list to choose from, or ``{of: NAME}``."""
        section = {**self.study.training, **self.study.start(name).training}
        return section.get("learning_rate", 3e-4)

    def owner(self, name: str) -> str:
        """The base or arm whose learning rate ``name`` uses: itself, or what ``of`` leads to."""
        while isinstance(rate := self.rates(name), dict):
            name = rate["of"]
        return name

    def sweep(self, name: str) -> Sweep | None:
        """How the rate was chosen; None where the recipe gives it.

        Raises:
            Waiting: for trials.
            SweepDiverged: none of them can be used.
        """
        trials = self.trials(name)
        if not trials:
            return None
        found = [(trial, self.records.get(trial.key)) for trial in trials]
        missing = [trial for trial, record in found if record is None]
        if missing:
            raise Waiting(missing)
        losses = [(r.learning_rate, r.last_loss) for _, r in found if r is not None]
        good = [pair for pair in losses if not math.isnan(pair[1])]
        if not good:
            tried = ", ".join(f"{rate:g}" for rate, _ in losses)
            raise SweepDiverged(
                f"Every learning rate of {self.owner(name)!r} diverged: {tried}.",
                "Give smaller ones.",
            )
        chosen = min(good, key=lambda pair: pair[1])[0]
        return Sweep(tuple(losses), chosen, self.study.sweep.share, self.study.sweep.seed)

    def trials(self, name: str) -> list[Node]:
        """The trials that the rate of a base or an arm is chosen by, by rising rate.

        Raises:
            Waiting: its base waits for trials of its own.
        """
        name = self.owner(name)
        rates = self.rates(name)
        if not isinstance(rates, list):
            return []
        return [self.trial(name, rate) for rate in sorted(map(float, rates))]

    def trial(self, name: str, rate: float) -> Node:
        """The trial of one learning rate.

        Raises:
            Waiting: its base waits for trials of its own.
        """
        return self._node(name, self.study.sweep.seed, rate, self.study.sweep.share)

    def short(self, name: str, seed: int, share: float) -> Node:
        """A run of a part of an arm's steps, with a decay of its own.

        Raises:
            Waiting: a learning rate is not chosen yet.
            SweepDiverged: no learning rate can be used.
        """
        node = self._node(name, seed, self.learning_rate(name), share)
        return replace(node, name=f"{name}, seed {seed}, {percent(share)} of the steps")

    def _node(self, name: str, seed: int, rate: float, share: float = 1.0) -> Node:
        start = self.study.start(name)
        parent = self.node(start.base, seed) if start.base is not None else None
        _, first = self.lengths.before(name)
        recipe = self._recipe(name, seed, rate, share)
        trial = "" if share == 1.0 else f", learning rate {rate:g}"
        origin = parent.key if parent is not None else None
        return Node(
            name=f"{name}, seed {seed}{trial}",
            start=start,
            seed=seed,
            parent=parent,
            shape=self.shapes.of(name),
            recipe=recipe,
            first_step=first,
            key=content_key(recipe, start, self.study, self.fingerprints, origin),
        )

    def check(self, name: str, short: float | None = None) -> None:
        """The runs of a base or an arm have a length, and warm-up and decay fit into it; ``short``:
        a run of this part of its steps.

        Raises:
            UsageError: naming the base or arm.
        """
        shares = [1.0]
        if short is not None:
            shares = [short]
        elif isinstance(self.rates(name), list):
            shares.append(self.study.sweep.share)
        what = "trial of a rate" if short is None else f"short run of {short:g} of its steps"
        for share in shares:
            # Neither rate nor seed matter here; what a child starts from is not there yet.
            recipe = self._recipe(name, 0, 1.0, share)
            if "config" not in recipe["model"]:
                recipe["model"] |= {"checkpoint": "."}
            make_recipe(recipe, f"{name!r}" + (f", {what}" if share < 1.0 else ""))

    def _recipe(self, name: str, seed: int, rate: float, share: float) -> dict[str, Any]:
        """The training recipe of a run."""
        start, lengths = self.study.start(name), self.lengths
        steps, per_step = lengths.steps(name, share), lengths.flops_per_step(name)
        _, first = lengths.before(name)
        training = {"schedule": "wsd", **self.study.training, **start.training}
        for part in PARTS:
            given = float(training.get(part, 0.2))
            if 0 < given < 1:
                wanted = round(given * share * lengths.given(name) / per_step)
                training[part] = max(min(wanted, steps), 1)
        interval = max(round(lengths.budget / self.study.evaluations / per_step), 1)
        training |= {
            "learning_rate": rate,
            "max_steps": first + steps,
            "seed": seed,
            "eval_steps": interval,
            "probe_steps": interval if self.study.series else 0,
            "logging_steps": max(steps // LOGGED, 1),
            "save_steps": max(steps // 4, 1),
            "save_total_limit": 1,
        }
        model: dict[str, Any] = {"dtype": start.dtype}
        if start.attn_implementation is not None:
            model["attn_implementation"] = start.attn_implementation
        if start.optimizer_state == "reset":
            model["optimizer_state"] = "reset"
        if start.from_scratch:
            model["config"] = self.shapes.config_of(start)
        values: dict[str, Any] = {
            "model": model,
            "data": {**self.study.to_dict()["data"], "cache_dir": str(self.cache)},
            "training": training,
        }
        if self.tokenizer is not None:
            values["tokenizer"] = {"path": str(self.tokenizer)}
        if start.base is not None:
            values["position"] = {
                "stage": 1,
                "first_step": first,
                "end_step": first + steps,
                "warmup_steps": start.rewarm_steps,
            }
        return values


def finished(records: Records, node: Node) -> list[Record] | None:
    """The records of a run and all before it, or None."""
    found = [records.get(one.key) for one in node.lineage]
    return [r for r in found if r is not None] if all(r is not None for r in found) else None
