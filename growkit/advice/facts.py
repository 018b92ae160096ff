"""What advice is computed from: a plan, or the folder that a training recipe starts from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.advice.memory import Shape, TrainingSetup
from growkit.checkpoint import open_checkpoint
from growkit.core.errors import GrowkitError
from growkit.families import family_of
from growkit.optimizer_state.store import FOLDER, INDEX
from growkit.record.cost import cost_of
from growkit.record.manifest import read_manifest, trained_tokens
from growkit.record.new_parameters import new_parameters
from growkit.record.plan_report import cost_context, main_dtype, plan_report, stored_dtypes

if TYPE_CHECKING:
    from growkit.surgery.plan import Plan
    from growkit.training.recipe import Recipe


@dataclass(frozen=True)
class Facts:
    """The model to be trained, how it came about, and how it will be trained.

    Attributes:
        shapes: its parameters; of a planned mixture one expert stands for its like.
        counts: how many parameters an entry of ``shapes`` stands for, where it is not one.
        new: the new-parameter map of its last growth; empty where it was not grown.
        flops_per_token: of a forward pass at ``context``; None for an architecture without family.
        growth: :func:`growkit.record.plan_report.plan_report` of that growth, or None.
        base_parameters: parameters of the model before the growth.
        trained_tokens: that the base has seen; None where nobody says.
        stored_dtype: safetensors dtype of most of its bytes.
        recipe: None where only a growth is planned.
        optimizer_goes_on: the run takes over optimizer state that was grown with the model.
    """

    shapes: Mapping[str, Shape]
    new: Mapping[str, Any]
    flops_per_token: int | None
    context: int
    growth: Mapping[str, Any] | None
    base_parameters: int
    trained_tokens: int | None
    stored_dtype: str
    recipe: Recipe | None = None
    optimizer_goes_on: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def operators(self) -> frozenset[str]:
        """What the growth did."""
        steps = self.growth["operators"] if self.growth else ()
        return frozenset(step["operator"] for step in steps)

    @property
    def parameters(self) -> int:
        """Of the model to be trained."""
        return sum(prod(s) * self.counts.get(name, 1) for name, s in self.shapes.items())

    @property
    def new_parameters(self) -> int:
        """New parameters, and new entries of grown ones."""
        return sum(
            new_entries(self.shapes[name], part) * self.counts.get(name, 1)
            for name, part in self.new.items()
        )

    @property
    def setup(self) -> TrainingSetup:
        """As the recipe says; float32 weights, AdamW and one process without one."""
        if self.recipe is None:
            return TrainingSetup()
        section, parallel = self.recipe.training, self.recipe.parallel
        dtype = self.recipe.model.dtype
        return TrainingSetup(
            dtype=self.stored_dtype if dtype == "auto" else dtype,
            optimizer=section.optimizer,
            bf16_autocast=section.bf16,
            strategy=parallel.strategy,
            processes=parallel.processes or launched(),
            tensor=parallel.tensor,
            context=parallel.context,
            new_only=section.train == "new",
            **one_pass(self.recipe, parallel.readers(parallel.processes or launched())),
        )


def one_pass(recipe: Recipe, processes: int) -> dict[str, Any]:
    """What decides the activations of a forward pass."""
    if recipe.sequences_per_step % processes:
        return {}
    sequences, _ = recipe.shares(processes)
    return {
        "tokens": sequences * recipe.data.sequence_length // recipe.parallel.context,
        "checkpointing": recipe.training.gradient_checkpointing,
    }


def launched() -> int:
    """How many processes torchrun (or the like) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def new_entries(shape: Shape, part: Any) -> int:
    """Entries of a tensor that are new: those in a new row, column or (of a stack) expert."""
    if part == "all":
        return prod(shape)
    labels = ("experts", "rows", "columns")[0 if len(shape) == 3 else 1 :]
    old = [
        size - sum(end - start for start, end in part.get(label, ()))
        for size, label in zip(shape, labels, strict=False)
    ]
    return prod(shape) - prod(old)


def facts_of_plan(plan: Plan, recipe: Recipe | None = None, tokens: int | None = None) -> Facts:
    """Of a growth that is planned; ``tokens`` that its source has seen, when no record says so."""
    report = plan_report(plan)
    context = recipe.data.sequence_length if recipe is not None else cost_context(plan.config)
    dtype = main_dtype(stored_dtypes(plan.checkpoint))
    cost = cost_of(plan.family, plan.sizes, dtype, context, plan.config)
    groups = plan.tensors.groups
    firsts = [group.first for group in groups]
    return Facts(
        shapes={tensor.output.name: tuple(tensor.output.shape) for tensor in firsts},
        new=new_parameters(plan, firsts),
        counts={group.first.output.name: group.count for group in groups if group.count > 1},
        flops_per_token=cost.flops_per_token,
        context=context,
        growth=report,
        base_parameters=report["before"]["parameters"],
        trained_tokens=tokens if tokens is not None else trained_tokens(plan.checkpoint.path),
        stored_dtype=dtype,
        recipe=recipe,
    )


def facts_of_recipe(recipe: Recipe) -> Facts | None:
    """Of a run that starts from a folder; None for one from scratch.

    The tokens are those before the last growth, when the folder was grown and not trained since.
    """
    source: Path | None = recipe.model.checkpoint
    if source is None:
        return None
    context = recipe.data.sequence_length
    with open_checkpoint(source) as checkpoint:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        dtype = main_dtype(stored_dtypes(checkpoint))
        try:
            family = family_of(checkpoint.config)
            sizes = family.sizes_of(checkpoint.config, checkpoint.tensors)
            flops = cost_of(family, sizes, dtype, context, checkpoint.config).flops_per_token
        except GrowkitError:
            flops = None  # an architecture that growkit trains but cannot grow
    manifest = read_manifest(source) or {}
    growth = manifest.get("plan")
    known = recipe.model.trained_tokens
    goes_on = recipe.model.optimizer_state == "auto" and (source / FOLDER / INDEX).is_file()
    return Facts(
        shapes=shapes,
        new={n: p for n, p in (manifest.get("new_parameters") or {}).items() if n in shapes},
        flops_per_token=flops,
        context=context,
        growth=growth,
        base_parameters=(
            growth["before"]["parameters"]
            if growth
            else sum(prod(shape) for shape in shapes.values())
        ),
        trained_tokens=known if known is not None else trained_tokens(source),
        stored_dtype=dtype,
        recipe=recipe,
        optimizer_goes_on=goes_on,
    )
