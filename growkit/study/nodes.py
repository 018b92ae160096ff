"""The training runs of a study, each under a key that says everything its result depends on.

A run is one phase of one arm with one seed (or of a base, or a trial of a learning rate). Runs that
are the same are made once: arms share their base, and studies share what they have in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growkit.errors import UsageError
from growkit.study.recipe import Base, Start, StudyRecipe
from growkit.study.records import Record, Records
from growkit.study.results import Sweep
from growkit.study.shapes import Shape, Shapes, digest
from growkit.training.run_folder import MAY_CHANGE

FORMAT = 1
# Steps of a schedule that may be given as a part of the whole: here, of the budget's FLOPs.
PARTS = ("decay_steps",)
LOGGED = 50


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
        parent: the run that it goes on from, or None.
        shape: of its model.
        recipe: a training recipe without ``model.checkpoint`` where it goes on from something.
        first_step: steps before it, those of its parents.
        flops_before: spent by its parents.
        key: content key.
    """

    name: str
    start: Start
    seed: int
    parent: Node | None
    shape: Shape
    recipe: dict[str, Any]
    first_step: int
    flops_before: float
    key: str

    @property
    def steps(self) -> int:
        """Of this run alone."""
        return int(self.recipe["training"]["max_steps"]) - self.first_step

    @property
    def flops_per_step(self) -> float:
        """Training FLOPs of an optimizer step."""
        section, length = self.recipe["training"], self.recipe["data"]["sequence_length"]
        sequences = section.get("per_device_train_batch_size", 8) * section.get(
            "gradient_accumulation_steps", 1
        )
        return float(self.shape.flops_per_token * sequences * length)

    @property
    def flops(self) -> float:
        """Of this run alone."""
        return self.steps * self.flops_per_step

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
        self.fingerprints, self.tokenizer, self.cache = fingerprints, tokenizer, cache

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, the same in all runs."""
        section = self.study.training
        sequences = section.get("per_device_train_batch_size", 8) * section.get(
            "gradient_accumulation_steps", 1
        )
        return int(sequences * self.study.data.sequence_length)

    @property
    def budget(self) -> float:
        """Training FLOPs of every arm."""
        budget = self.study.budget
        if budget.training_flops is not None:
            return budget.training_flops
        assert budget.arm is not None and budget.tokens is not None
        return budget.tokens * self.shapes.of(budget.arm).flops_per_token

    def node(self, name: str, seed: int) -> Node:
        """The run of a base or an arm.

        Raises:
            Waiting: a learning rate is not chosen yet.
            UsageError: nothing is left of the budget.
        """
        return self._node(name, seed, self.learning_rate(name))

    def learning_rate(self, name: str) -> float:
        """The peak rate of a base or an arm.

        Raises:
            Waiting: for trials of it.
        """
        rate = self.rates(name)
        if isinstance(rate, dict):
            return self.learning_rate(rate["of"])
        if not isinstance(rate, list):
            return float(rate)
        sweep = self.sweep(name)
        assert sweep is not None
        return sweep.chosen

    def rates(self, name: str) -> Any:
        """What the recipe says: a number, a list to choose from, or ``{of: NAME}``."""
        section = {**self.study.training, **self.study.start(name).training}
        return section.get("learning_rate", 3e-4)

    def sweep(self, name: str) -> Sweep | None:
        """How the rate was chosen; None where the recipe gives it.

        Raises:
            Waiting: for trials.
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
            raise UsageError(
                f"Every learning rate of {name!r} diverged: {[rate for rate, _ in losses]}.",
                "Give smaller ones.",
            )
        chosen = min(good, key=lambda pair: pair[1])[0]
        return Sweep(tuple(losses), chosen, self.study.sweep.share, self.study.sweep.seed)

    def trials(self, name: str) -> list[Node]:
        """The trials that the rate of a base or an arm is chosen by, by rising rate.

        Raises:
            Waiting: its base waits for trials of its own.
        """
        rates, section = self.rates(name), self.study.sweep
        if isinstance(rates, dict):
            return self.trials(rates["of"])
        if not isinstance(rates, list):
            return []
        return [
            self._node(name, section.seed, float(rate), section.share) for rate in sorted(rates)
        ]

    def _node(self, name: str, seed: int, rate: float, share: float = 1.0) -> Node:
        start = self.study.start(name)
        parent = self.node(start.base, seed) if start.base is not None else None
        shape = self.shapes.of(name)
        per_step = shape.flops_per_token * self.tokens_per_step
        before, first = self._before(name)
        steps = self.steps(name, share)
        budget = share * self._flops(name)
        values = self._recipe(start, seed, rate, first, steps, per_step, budget)
        trial = "" if share == 1.0 else f", learning rate {rate:g}"
        return Node(
            name=f"{name}, seed {seed}{trial}",
            start=start,
            seed=seed,
            parent=parent,
            shape=shape,
            recipe=values,
            first_step=first,
            flops_before=before,
            key=self._key(values, start, parent),
        )

    def steps(self, name: str, share: float = 1.0) -> int:
        """Optimizer steps of a base or an arm, without those of what it goes on from.

        Raises:
            UsageError: nothing is left of the budget.
        """
        before, _ = self._before(name)
        whole = self._flops(name)
        left = whole if isinstance(self.study.start(name), Base) else whole - before
        steps = int(share * left / (self.shapes.of(name).flops_per_token * self.tokens_per_step))
        if steps < 1:
            raise UsageError(
                f"{name!r} has nothing left to train on: its base spent {before:.3g} of "
                f"{whole:.3g} training FLOPs.",
                "Raise the budget, or shorten the base.",
            )
        return steps

    def _before(self, name: str) -> tuple[float, int]:
        """(training FLOPs, steps) of what a base or an arm goes on from."""
        base = self.study.start(name).base
        if base is None:
            return 0.0, 0
        flops, steps = self._before(base)
        own = self.steps(base)
        cost = own * self.shapes.of(base).flops_per_token * self.tokens_per_step
        return flops + cost, steps + own

    def _flops(self, name: str) -> float:
        """The budget of an arm, or what a base is given."""
        start = self.study.start(name)
        if not isinstance(start, Base):
            return self.budget
        if start.training_flops is not None:
            return start.training_flops
        assert start.tokens is not None
        return start.tokens * self.shapes.of(name).flops_per_token

    def _recipe(
        self,
        start: Start,
        seed: int,
        rate: float,
        first: int,
        steps: int,
        per_step: float,
        budget: float,
    ) -> dict[str, Any]:
        """The training recipe of a run."""
        training = {"schedule": "wsd", **self.study.training, **start.training}
        for part in PARTS:
            given = training.get(part, 0.2)
            if given < 1:
                training[part] = max(min(round(given * budget / per_step), steps), 1)
        interval = max(round(self.budget / self.study.evaluations / per_step), 1)
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

    def _key(self, values: dict[str, Any], start: Start, parent: Node | None) -> str:
        """A hash of all that the result depends on; places and intervals of logging are not."""
        training = {
            key: value
            for key, value in values["training"].items()
            if f"training.{key}" not in MAY_CHANGE or key in ("max_steps", "max_tokens")
        }
        training.pop("use_cpu", None)
        data = {
            key: value
            for key, value in values["data"].items()
            if key not in ("files", "eval_files", "cache_dir", "workers")
        }
        origin = None
        if start.checkpoint is not None:
            origin = self.fingerprints[str(start.checkpoint)]
        # Figures besides the loss belong to the result of an arm: a run without them is another.
        observed = (
            {}
            if isinstance(start, Base)
            else {
                name: value
                for name, value in (
                    ("measures", self.study.measures),
                    ("series", self.study.series),
                )
                if value
            }
        )
        return digest(
            {
                **observed,
                "format": FORMAT,
                "model": values["model"],
                "data": data,
                "training": training,
                "position": values.get("position"),
                "content": self.fingerprints["data"],
                "tokenizer": self.fingerprints.get("tokenizer"),
                "change": start.change,
                "parent": parent.key if parent is not None else origin,
            }
        )


def finished(records: Records, node: Node) -> list[Record] | None:
    """The records of a run and all before it, or None."""
    found = [records.get(one.key) for one in node.lineage]
    return [r for r in found if r is not None] if all(r is not None for r in found) else None
