"""Several operators become one growth: maps are chained, exactness is the worst of all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from growkit.core.errors import GrowkitError, UsageError
from growkit.families import Family
from growkit.families.expert_tensors import moved_layers
from growkit.families.unit_layout import Sizes
from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import NEW, AxisMap
from growkit.surgery.effect import (
    NO_LAYER,
    Alias,
    Effect,
    Exactness,
    LayerMap,
    LayerSource,
    ModelShape,
    Operator,
    WarmStart,
)
from growkit.surgery.operators import units_of

# Operators that a warm start pads.
PADDED = (
    *("layers", "decoder_layers", "ffn", "hidden", "heads", "query_heads", "kv_heads"),
    *("signal_heads", "noise_heads", "uniform_heads"),
)


def compose(operators: Sequence[Operator], shape: ModelShape) -> Effect:
    """Apply the operators one after another on paper.

    Raises:
        UsageError: when an operator cannot be applied.
        GrowkitError: when the maps would connect a head to another noise or kv head than its
            source (a defect of an operator; the check is the proof on paper).
    """
    effect = Effect(
        sizes=dict(shape.sizes),
        stacks=kept_layers((stack.axis for stack in shape.family.stacks), shape.sizes),
        exactness=Exactness.BIT_EXACT,
    )
    for operator in operators:
        config = {**shape.config, **effect.fields}
        reached = replace(shape, sizes=dict(effect.sizes), config=config)
        check_affordable(operator, reached)
        effect = _then(effect, operator.apply(reached))
    check_links(shape, shape.family, effect)
    return effect


def kept_layers(stacks: Iterable[str], sizes: Sizes) -> dict[str, LayerMap]:
    """Every layer of every stack from itself."""
    return {
        axis: tuple(LayerSource(layer, "kept") for layer in range(sizes[axis])) for axis in stacks
    }


def _then(before: Effect, step: Effect) -> Effect:
    """The joint effect of what came before and one operator more."""
    sizes, axes, stacks = dict(before.sizes), dict(before.axes), dict(before.stacks)
    for axis, axis_map in step.axes.items():
        axes[axis] = axes[axis].then(axis_map) if axis in axes else axis_map
        sizes[axis] = axis_map.new_size
    for stack, layers in step.stacks.items():
        stacks[stack] = _chain_layers(stacks[stack], layers)
        sizes[stack] = len(layers)
        sizes |= moved_layers(sizes, [layer.source for layer in layers])
    factors = dict(before.factors)
    for role, factor in step.factors.items():
        factors[role] = factors.get(role, 1.0) * factor
    return Effect(
        steps=(*before.steps, step),
        warnings=(*before.warnings, *step.warnings),
        exactness=before.exactness.worst(step.exactness),
        sizes={**sizes, **step.sizes},
        axes=axes,
        stacks=stacks,
        kinds_by_rule=before.kinds_by_rule or step.kinds_by_rule,
        fresh_state=before.fresh_state or step.fresh_state,
        new_units={**before.new_units, **step.new_units},
        fields={**before.fields, **step.fields},
        family=before.family or step.family,
        new_tokens=before.new_tokens or step.new_tokens,
        files={**before.files, **step.files},
        aliases={**before.aliases, **step.aliases},
        expert_copies=before.expert_copies * step.expert_copies,
        noisy_experts=max(before.noisy_experts, step.noisy_experts),
        expert_reinit=max(before.expert_reinit, step.expert_reinit),
        split=before.split or step.split,
        fused={**before.fused, **step.fused},
        noise_copies=before.noise_copies * step.noise_copies,
        factors=factors,
        norm_factor=before.norm_factor * step.norm_factor,
        stream_factor=before.stream_factor * step.stream_factor,
        key_factor=before.key_factor * step.key_factor,
    )


def padded(growth: Effect, start: WarmStart) -> Effect:
    """A composed growth with zeros where it has copies, called what it is: another function.

    Raises:
        UsageError: a growth that has no padding.
    """
    wrong = [step.operator for step in growth.steps if step.operator not in PADDED]
    if wrong or growth.noise_copies > 1:
        what = wrong[0] if wrong else "more noise than signal heads"
        raise UsageError(
            f"--warm-start pads width and depth, and {what.replace('_', ' ')} has no padding.",
            "Grow that in a step of its own, without --warm-start.",
        )
    axes = {
        axis: AxisMap(np.where(map_.rank > 0, NEW, map_.source), map_.old_size, map_.partial)
        for axis, map_ in growth.axes.items()
    }
    steps = tuple(
        replace(
            step,
            summary=f"{step.summary.replace(' (copies)', '')}; shrink, pad, perturb",
            exactness=Exactness.NOT_EXACT,
            reason="shrunk weights, zero-padded, and the start of a model from scratch on top "
            "(arXiv 2411.07340, 2605.13405): another function, to be trained",
        )
        for step in growth.steps
    )
    warning = f"warm start {start.told}; it does not keep the function"
    return replace(
        growth,
        axes=axes,
        new_units={},
        factors={},
        steps=steps,
        warm_start=start,
        exactness=Exactness.NOT_EXACT,
        warnings=(*growth.warnings, warning),
    )


def _chain_layers(first: LayerMap, second: LayerMap) -> LayerMap:
    chained = []
    for layer in second:
        if layer.source == NO_LAYER:
            chained.append(layer)
            continue
        inner = first[layer.source]
        kept = layer.kind == "kept" or inner.kind == "identity" or inner.from_scratch
        kind = inner.kind if kept else layer.kind
        partner = first[layer.partner].source if layer.partner != NO_LAYER else NO_LAYER
        chained.append(LayerSource(inner.source, kind, partner))
    return tuple(chained)


def check_links(shape: ModelShape, family: Family, effect: Effect) -> None:
    """Every written head has to work with copies of the heads that its source works with.

    This is the proof on paper. ``family`` is the one whose links hold in the written model.
    """
    known = {(link.source, link.target): link for link in shape.family.links}
    for link in family.links:
        (heads, head_map), (read, read_map) = (
            _in_source(axis, effect) for axis in (link.source, link.target)
        )
        before = known.get((heads, read))
        if before is None:
            continue
        copied = head_map.source != NEW
        copies = effect.noise_copies if link.target == "noise_head" else 1
        expected = np.repeat(before.indices(shape.sizes)[head_map.source[copied]], copies, axis=1)
        found = read_map.source[link.indices(effect.sizes)[copied]]
        if expected.shape != found.shape or (np.sort(expected) != np.sort(found)).any():
            what, remedy = (
                ("conversion", "Please report this: it is a defect of the conversion.")
                if effect.converts
                else (
                    "plan",
                    "This combination of operators does not keep the function; grow in two steps.",
                )
            )
            raise GrowkitError(
                f"The {what} would move {link.source.replace('_', ' ')}s to other "
                f"{link.target.replace('_', ' ')}s.",
                remedy,
            )


def _in_source(axis: str, effect: Effect) -> tuple[str, AxisMap]:
    """(axis of the source, map from it) of a written axis."""
    name = effect.aliases.get(axis, Alias(axis)).axis
    return name, effect.axes.get(axis) or AxisMap.identity(effect.sizes[axis])


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
    if not size:  # layers of a model that has none: the first of them says what one needs
        size, shape = 1, replace(shape, sizes={**shape.sizes, axis: 1})
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
