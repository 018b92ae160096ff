"""Several operators become one growth: maps are chained, exactness is the worst of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import numpy as np

from growkit.core.errors import GrowkitError, UsageError
from growkit.families.experts import moved_layers
from growkit.families.layout import Sizes
from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import NEW, AxisMap
from growkit.surgery.conversion import Converted
from growkit.surgery.effect import (
    Exactness,
    Growth,
    LayerMap,
    LayerSource,
    ModelShape,
    NewUnits,
    Operator,
)
from growkit.surgery.operators import units_of


@dataclass(frozen=True)
class ComposedGrowth:
    """The joint effect of all operators of a plan.

    Attributes:
        steps: what each operator returned, in order.
        sizes: sizes of the grown model.
        axes: map of every axis that grew, from the source to the grown model.
        stacks: for each stack of layers, the source of every layer of the grown model.
        new_units: what new units of an axis hold, where it is not random and read with zero.
        noise_copies: copies of each old noise map that a signal head subtracts.
        expert_copies: copies of every old expert that are chosen together and share its output.
        noisy_experts: experts made of one, each with noise of its own.
        expert_reinit: part of each new expert's FFN units that is drawn anew.
        family: name of the family of the grown model, when it is another one.
        final_norm_factor: factor on the final norm's gain.
        embedding_factor: factor on the input embedding.
        norm_factor: factor on the gain of every norm over the residual stream.
        stream_factor: factor on everything that writes the residual stream.
        key_factor: factor on whatever makes attention keys.
        config: config fields to rewrite, beside the sizes.
        exactness: the worst of the steps.
        conversion: the other attention that the model is written in, if it is not growth.
        perturbed: axes whose copies nobody shares a weight among, so that noise on what produces
            them has to part them.
    """

    steps: tuple[Growth, ...]
    sizes: dict[str, int]
    axes: dict[str, AxisMap]
    stacks: dict[str, LayerMap]
    new_units: dict[str, NewUnits]
    noise_copies: int
    final_norm_factor: float
    embedding_factor: float
    norm_factor: float
    stream_factor: float
    key_factor: float
    config: dict[str, Any]
    exactness: Exactness
    expert_copies: int = 1
    noisy_experts: int = 1
    expert_reinit: float = 0.0
    family: str | None = None
    conversion: Converted | None = None
    perturbed: frozenset[str] = frozenset()

    @property
    def tied(self) -> tuple[str, ...]:
        """Axes whose copies get equal gradients whatever the shares: past 1:1 the copies of a noise
        head have equal rows, equal readers and one lambda, and their maps are added after the
        softmax, so that no split of their rows keeps the sum."""
        return ("noise_head",) if self.noise_copies > 1 and not self.perturbed else ()

    @property
    def layers(self) -> LayerMap:
        """Source of every layer of the first stack (the only one of a decoder)."""
        return self.stacks["layer"]

    @property
    def layers_moved(self) -> bool:
        """Some layer of the first stack stands at another index than its source."""
        return any(step.layers is not None and step.stack == "layer" for step in self.steps)


def compose(operators: Sequence[Operator], shape: ModelShape) -> ComposedGrowth:
    """Apply the operators one after another on paper.

    Raises:
        UsageError: when an operator cannot be applied.
        GrowkitError: when the maps would connect a head to another noise or kv head than its
            source (a defect of an operator; the check is the proof on paper).
    """
    old_sizes = dict(shape.sizes)
    sizes = dict(old_sizes)
    axes: dict[str, AxisMap] = {}
    stacks: dict[str, LayerMap] = {
        stack.axis: tuple(LayerSource(i, "kept") for i in range(sizes[stack.axis]))
        for stack in shape.family.stacks
    }
    new_units: dict[str, NewUnits] = {}
    config: dict[str, Any] = {}
    steps = []
    for operator in operators:
        reached = replace(shape, sizes=dict(sizes), config={**shape.config, **config})
        check_affordable(operator, reached)
        growth = operator.apply(reached)
        steps.append(growth)
        new_units.update(growth.new_units)
        config.update(growth.config)
        for axis, axis_map in growth.axes.items():
            axes[axis] = axes[axis].then(axis_map) if axis in axes else axis_map
            sizes[axis] = axis_map.new_size
        if growth.layers is not None:
            stacks[growth.stack] = _chain_layers(stacks[growth.stack], growth.layers)
            sizes[growth.stack] = len(growth.layers)
            sizes |= moved_layers(sizes, [layer.source for layer in growth.layers])
        sizes.update(growth.sizes)
    noise_copies = prod(step.noise_copies for step in steps)
    check_links(shape, old_sizes, sizes, axes, noise_copies)
    return ComposedGrowth(
        steps=tuple(steps),
        sizes=sizes,
        axes=axes,
        stacks=stacks,
        new_units=new_units,
        noise_copies=noise_copies,
        final_norm_factor=prod(step.final_norm_factor for step in steps),
        embedding_factor=prod(step.embedding_factor for step in steps),
        expert_copies=prod(step.expert_copies for step in steps),
        noisy_experts=max((step.noisy_experts for step in steps), default=1),
        expert_reinit=max((step.expert_reinit for step in steps), default=0.0),
        family=next((step.family for step in steps if step.family), None),
        norm_factor=prod(step.norm_factor for step in steps),
        stream_factor=prod(step.stream_factor for step in steps),
        key_factor=prod(step.key_factor for step in steps),
        config=config,
        exactness=reduce(Exactness.worst, (s.exactness for s in steps), Exactness.BIT_EXACT),
    )


def _chain_layers(first: LayerMap, second: LayerMap) -> LayerMap:
    chained = []
    for layer in second:
        inner = first[layer.source]
        kind = inner.kind if layer.kind == "kept" or inner.kind == "identity" else layer.kind
        chained.append(LayerSource(inner.source, kind))
    return tuple(chained)


def check_links(
    shape: ModelShape, old: Sizes, new: Sizes, axes: dict[str, AxisMap], noise_copies: int
) -> None:
    """Every copied head has to work with copies of the heads that its source works with."""
    for link in shape.family.links:
        source_map = axes.get(link.source) or AxisMap.identity(old[link.source])
        target_map = axes.get(link.target) or AxisMap.identity(old[link.target])
        copied = source_map.source != NEW
        before = link.indices(old)[source_map.source[copied]]
        after = target_map.source[link.indices(new)[copied]]
        copies = noise_copies if link.target == "noise_head" else 1
        expected = np.sort(np.repeat(before, copies, axis=1), axis=1)
        if expected.shape != after.shape or (expected != np.sort(after, axis=1)).any():
            raise GrowkitError(
                f"The plan would move {link.source.replace('_', ' ')}s to other "
                f"{link.target.replace('_', ' ')}s.",
                "This combination of operators does not keep the function; grow in two steps.",
            )


# A plan holds several numbers for each unit of an axis, and an object for each tensor of a layer.
MOST_UNITS, MOST_LAYERS, MOST_EXPERTS = 1 << 24, 1 << 16, 1 << 13
MOST_BYTES = 10**14


def check_affordable(operator: Operator, shape: ModelShape) -> None:
    """Refuse a size whose weights would need more than 100 TB, or that cannot be planned.

    Raises:
        UsageError: with the bytes that the grown axis alone would need, at two a weight, or the
            number of experts.
    """
    amount, axis = getattr(operator, "amount", None), str(getattr(operator, "axis", ""))
    if not isinstance(amount, Amount) or (axis not in shape.sizes and axis != "expert"):
        return
    size = shape.sizes.get(axis, 1)  # a dense FFN counts as one expert
    target = amount.exact(size)
    if axis == "expert" and target > MOST_EXPERTS:
        raise UsageError(
            f"{amount.text} asks for {int(target):,} experts from {size:,}; growkit plans at most "
            f"{MOST_EXPERTS:,}, each of them three matrices a layer.",
            "Ask for fewer.",
        )
    layers = any(stack.axis == axis for stack in shape.family.stacks)
    needed = 2 * _weights(shape, axis) * target / size
    if needed <= MOST_BYTES and target <= (MOST_LAYERS if layers else MOST_UNITS):
        return
    raise UsageError(
        f"{amount.text} asks for {int(target):,} {units_of(axis)} "
        f"from {size:,}: at least {float(needed) / 1e12:,.4g} TB of weights.",
        "Ask for a size that fits on a disk.",
    )


def _weights(shape: ModelShape, axis: str) -> int:
    """Weights of all tensors that the axis is a part of."""
    sizes, total = shape.sizes, 0
    for tensor in shape.family.tensors:
        if not tensor.when(sizes):
            continue
        inside = any(axis in dim.layout(sizes).axes for dim in tensor.dims)
        if inside or (tensor.per_layer and tensor.stack == axis) or axis == "head_dim":
            copies = sizes[tensor.stack] if tensor.per_layer else 1
            copies *= sizes["expert"] if "{expert}" in tensor.name else 1
            total += copies * prod(tensor.shape(sizes))
    return total
