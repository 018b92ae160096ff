"""Shapes and lengths of a study before anything is trained: parameters, FLOPs per token, steps.

A shape is found by doing what the study will do, on untrained weights: the model is made from its
config, and a growth or a conversion is planned on it. Nothing is estimated. From the shapes
follow the steps that the budget gives every base and arm. No torch but for untrained weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError
from growkit.core.writing import make_whole
from growkit.families import Family, family_of
from growkit.record.cost import cost_of, training_flops
from growkit.study.recipe import Base, Start, StudyRecipe
from growkit.surgery.plan import Plan, build_conversion_plan, plan_growth
from growkit.surgery.request import GrowthRequest

if TYPE_CHECKING:
    from growkit.checkpoint import Checkpoint

# Of a config.json: what says nothing about the shape.
NO_SHAPE = ("growkit", "auto_map", "architectures", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Shape:
    """The configuration of a model and what a training token costs it.

    Attributes:
        config: of a config.json, without what depends on versions and files.
        parameters: a tied output projection counts once.
        flops_per_token: of training, at the study's sequence length.
    """

    config: dict[str, Any]
    parameters: int
    flops_per_token: float

    @cached_property
    def key(self) -> str:
        """Equal for equal configurations."""
        return digest(self.config)


def digest(values: Any) -> str:
    """A short hash of JSON-able values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Shapes:
    """Shapes by the names of bases and arms.

    Args:
        folder: where untrained models are kept, by content.
        tokenizer: folder of the study's tokenizer, None where every model brings its own.
    """

    def __init__(self, study: StudyRecipe, folder: Path, tokenizer: Path | None) -> None:
        self.study, self.folder, self.tokenizer = study, folder, tokenizer
        self._known: dict[str, Shape] = {}

    def of(self, name: str) -> Shape:
        """The final shape of a base or an arm.

        Raises:
            UsageError, CheckpointError: the config, the growth or the conversion cannot be used.
        """
        if name not in self._known:
            self._known[name] = self._measure(self.study.start(name))
        return self._known[name]

    def config_of(self, start: Start) -> dict[str, Any]:
        """The model config that a start from scratch is made from."""
        if start.shape_of is not None:
            return dict(self.of(start.shape_of).config)
        assert start.config is not None
        return dict(start.config)

    def _measure(self, start: Start) -> Shape:
        with open_checkpoint(self._origin(start)) as checkpoint:
            plan = plan_of(start, checkpoint)
            if plan is not None:
                return self._shape(plan.family, plan.sizes, plan.config)
            family = family_of(checkpoint.config, checkpoint.tensors)
            sizes = family.sizes_of(checkpoint.config, checkpoint.tensors)
            return self._shape(family, sizes, checkpoint.config)

    def _shape(self, family: Family, sizes: Mapping[str, int], config: Mapping[str, Any]) -> Shape:
        cost = cost_of(family, sizes, "F32", self.study.data.sequence_length, config)
        kept = {key: value for key, value in config.items() if key not in NO_SHAPE}
        return Shape(kept, cost.parameters, training_flops(cost.flops_per_token))

    def _origin(self, start: Start) -> Path:
        """A folder with the model before the change of ``start``, untrained if need be."""
        if start.checkpoint is not None:
            return start.checkpoint
        if start.base is not None:
            return self._drafted(self.study.bases[start.base])
        return self._untrained(self.config_of(start))

    def _drafted(self, base: Start) -> Path:
        """A folder with the shape of a base."""
        origin = self._origin(base)
        if base.change is None:
            return origin
        return make_whole(
            self.folder / digest([str(origin), base.change]),
            lambda folder: _draft(base, origin, folder),
        )

    def _untrained(self, config: dict[str, Any]) -> Path:
        return make_whole(
            self.folder / digest(config), lambda folder: self._make_untrained(config, folder)
        )

    def _make_untrained(self, config: dict[str, Any], folder: Path) -> None:
        from growkit.data.tokenizer import load_tokenizer
        from growkit.training.models import build_model
        from growkit.training.recipe import ModelSection
        from growkit.verification.loading import quiet_transformers

        assert self.tokenizer is not None, "a study with models from scratch has a tokenizer"
        with quiet_transformers():
            model = build_model(ModelSection(config=config), load_tokenizer(self.tokenizer), 0)
            model.save_pretrained(folder)


def _draft(base: Start, origin: Path, folder: Path) -> None:
    apply_change(base, origin, folder, verify=False)


def plan_of(start: Start, checkpoint: Checkpoint) -> Plan | None:
    """The plan of a start's change on an opened checkpoint; None where nothing changes.

    Raises:
        UsageError, CheckpointError: the change does not fit the checkpoint.
    """
    if start.grow is not None:
        request = GrowthRequest.from_mapping(start.grow)
        return plan_growth(checkpoint, request)
    if start.convert is not None:
        asked = start.conversion()
        return build_conversion_plan(
            checkpoint, asked.conversion(), symmetry=asked.symmetry_choice()
        )
    return None


def apply_change(
    start: Start, source: Path, target: Path, *, verify: bool = True
) -> dict[str, Any]:
    """Grow or convert ``source`` into ``target``; returns the manifest.

    Optimizer state goes along where the source is a run that has it and the growth keeps it.
    """
    if start.grow is not None:
        from growkit.growing import grow_checkpoint

        request = GrowthRequest.from_mapping(start.grow)
        return grow_checkpoint(source, target, request, verify=verify)[1]
    from growkit.converting import convert_checkpoint

    return convert_checkpoint(source, target, start.conversion(), verify=verify)[1]


# Of the last bits of a float.
ROUNDING = 1e-12


class Lengths:
    """Steps and training FLOPs by the names of bases and arms."""

    def __init__(self, study: StudyRecipe, shapes: Shapes) -> None:
        self.study, self.shapes = study, shapes

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, the same in all runs."""
        section = self.study.training
        sequences = int(section.get("per_device_train_batch_size", 8))
        sequences *= int(section.get("gradient_accumulation_steps", 1))
        return sequences * self.study.data.sequence_length

    @property
    def budget(self) -> float:
        """Training FLOPs of every arm that has no budget of its own."""
        budget = self.study.budget
        if budget.training_flops is not None:
            return budget.training_flops
        assert budget.arm is not None and budget.tokens is not None
        return budget.tokens * self.shapes.of(budget.arm).flops_per_token

    def flops_per_step(self, name: str) -> float:
        """Training FLOPs of an optimizer step of a base or an arm."""
        return self.shapes.of(name).flops_per_token * self.tokens_per_step

    def steps(self, name: str, share: float = 1.0) -> int:
        """Optimizer steps of a base or an arm, without those of what it continues from.

        The last step is the last whole one within the budget.

        Raises:
            UsageError: not one step is left of the budget.
        """
        before, _ = self.before(name)
        whole, step = self.given(name), self.flops_per_step(name)
        left = whole if isinstance(self.study.start(name), Base) else whole - before
        # Steps that were counted out in tokens come back as the whole number that they were.
        steps = math.floor(share * left / step * (1 + ROUNDING))
        if steps >= 1:
            return steps
        if left <= 0:
            raise UsageError(
                f"{name!r} has nothing left to train on: its base spent {before:.3g} of "
                f"{whole:.3g} training FLOPs.",
                "Raise the budget, or shorten the base.",
            )
        if left < step:
            raise UsageError(
                f"{name!r} has {left:.3g} training FLOPs, less than one step of it "
                f"({step:.3g} FLOPs, {self.tokens_per_step:,} tokens).",
                "Raise the budget, shorten what it continues from, or make its steps smaller.",
            )
        raise UsageError(
            f"A trial of the learning rate of {name!r} has less than one step: sweep.share "
            f"{share:g} of {left / step:.1f} steps.",
            "Raise sweep.share or the budget.",
        )

    def before(self, name: str) -> tuple[float, int]:
        """(training FLOPs, steps) of what a base or an arm continues from."""
        base = self.study.start(name).base
        if base is None:
            return 0.0, 0
        flops, steps = self.before(base)
        own = self.steps(base)
        return flops + own * self.flops_per_step(base), steps + own

    def given(self, name: str) -> float:
        """The budget of an arm, or what a base is given."""
        start = self.study.start(name)
        if start.training_flops is not None:
            return start.training_flops
        if not isinstance(start, Base):
            return self.budget
        assert start.tokens is not None
        return start.tokens * self.shapes.of(name).flops_per_token
