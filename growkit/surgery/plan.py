"""The plan: what every tensor of the larger model is made of. Data, no tensor read, no torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from math import prod
from typing import Any

import numpy as np

from growkit.checkpoint import (
    DTYPES,
    Checkpoint,
    TensorInfo,
    check_copies_only,
    check_unquantised,
)
from growkit.core.errors import UsageError
from growkit.families import FAMILIES, Family, family_of, family_of_tower
from growkit.families.config_fields import MAX_TENSORS
from growkit.families.stored_parts import without, without_prediction
from growkit.surgery.compose import check_links, compose, kept_layers, padded
from growkit.surgery.effect import Effect, Exactness, ModelShape, Operator, WarmStart, check_allowed
from growkit.surgery.grown_config import grown_config, head_dim_note, sizes_that_load
from growkit.surgery.plan_builder import PlanBuilder, PlannedTensors
from growkit.surgery.request import GrowthRequest
from growkit.surgery.source_checks import tied_head_note
from growkit.surgery.symmetry import Symmetry


@dataclass(frozen=True)
class Plan:
    """Everything that will be written, decided before a byte is.

    Attributes:
        checkpoint: the opened source.
        source_family, family: format read and format written (they differ when the source's own
            format cannot hold the grown model).
        source_sizes, growth: axis sizes before, and the composed growth.
        config: content of the written config.json, without the growkit block.
        tensors: every written tensor, in writing order, and by kind.
        symmetry: how copies share weights.
        exactness: of the whole plan.
        warnings: what a user should know.
    """

    checkpoint: Checkpoint
    source_family: Family
    family: Family
    source_sizes: Mapping[str, int]
    growth: Effect
    config: dict[str, Any]
    tensors: PlannedTensors
    symmetry: Symmetry
    exactness: Exactness
    warnings: tuple[str, ...] = field(default=())

    @property
    def sizes(self) -> Mapping[str, int]:
        """Axis sizes of the grown model."""
        return self.growth.sizes

    @property
    def converted(self) -> bool:
        """The grown model is written in another format than the source's."""
        return self.family.name != self.source_family.name

    @property
    def total_bytes(self) -> int:
        """Bytes of all written tensors."""
        return sum(group.count * group.first.nbytes for group in self.tensors.groups)


def build_plan(
    checkpoint: Checkpoint,
    operators: Sequence[Operator],
    *,
    symmetry: Symmetry | None = None,
    target: str | None = None,
    asked: Sequence[str] = (),
    drop: str | None = None,
    part: str | None = None,
    warm_start: WarmStart | None = None,
) -> Plan:
    """Decide what every tensor of the grown checkpoint is made of.

    Args:
        checkpoint: opened source; only headers, config and lambda vectors are read.
        operators: applied in order, as one composed growth.
        symmetry: how copies of a unit share its weight (default: split).
        target: name of the family to write; by default the source's own, or ``gda`` where that
            cannot hold the grown model.
        asked: flags that asked for the operators; the family may refuse them by name.
        drop: regular expression of tensors that the class does not read, which are left out.
        part: of a multimodal model, the tower that grows.
        warm_start: shrink, pad and perturb in place of copying; the plan is then not exact.

    Raises:
        UsageError: quantised weights, unknown family, impossible size, or a model that
            transformers would refuse.
        CheckpointError: tensors that the family does not declare, or with wrong shapes.
    """
    symmetry = symmetry or Symmetry()
    source_family, source_sizes = read_source(checkpoint, part)
    stored = source_family.unread
    if drop is not None:
        source_family = without(source_family, drop)
    shape = ModelShape(source_family, source_sizes, checkpoint.config, checkpoint.path)
    for flag in asked:
        check_allowed(shape, flag)
    growth = compose(operators, shape)
    _check_copies(checkpoint, source_family, growth, ", ".join(asked))
    growth = replace(growth, warnings=(*growth.warnings, *_unread_note(stored, source_family)))
    if warm_start is not None:
        growth = padded(growth, warm_start)
    if symmetry.equal:
        # The mean of equal copies is the expert: nothing to divide.
        growth = replace(growth, expert_copies=1)
    if symmetry.mode == "noise" and growth.tied:
        growth = replace(growth, perturbed=frozenset(growth.tied), exactness=Exactness.NOT_EXACT)
    family = _choose_family(source_family, growth, checkpoint.config, target)
    if family is not source_family:
        facts = family.adopted_facts(checkpoint.config)
        growth = replace(growth, sizes={**growth.sizes, **facts})
    config = grown_config(checkpoint.config, source_family, family, source_sizes, growth)
    if drop is not None and not family.unread:
        config = without_prediction(config)
    builder = PlanBuilder(checkpoint, source_family, family, source_sizes, growth, config)
    return plan_of(builder, symmetry)


def _check_copies(checkpoint: Checkpoint, family: Family, growth: Effect, asked: str) -> None:
    """Raise UsageError where a growth would change what can be copied alone."""
    kinds = {layer.kind for layers in growth.stacks.values() for layer in layers}
    if not (growth.axes or growth.family or kinds - {"kept", "copy", "identity"}):
        return
    check_copies_only(checkpoint, asked)
    if growth.axes and family.unread:
        more = len(family.unread) - 1
        raise UsageError(
            f"{family.unread[0]!r}{f' and {more} more' if more else ''} belong to layers that the "
            f"class does not read (multi-token prediction), which {asked} would leave at the old "
            "size.",
            f"Leave them out: --drop-tensors {shlex.quote(_pattern(family.unread))}, or grow "
            "--layers alone.",
        )


def _unread_note(stored: Sequence[str], family: Family) -> list[str]:
    """What becomes of the tensors that the class does not read."""
    kept, gone = len(family.unread), len(stored) - len(family.unread)
    notes = []
    for count, fate in ((kept, "copied as they are"), (gone, "left out (--drop-tensors)")):
        if count:
            name = next(n for n in stored if (n in family.unread) == (fate[0] == "c"))
            notes.append(
                f"{count:,} tensors that the class does not read are {fate}: {name!r}"
                + (" ..." if count > 1 else "")
            )
    return notes


def _pattern(names: Sequence[str]) -> str:
    """A regular expression of what names begin with."""
    starts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    common = takewhile(lambda parts: len(set(parts)) == 1, starts)
    return re.escape("".join(f"{parts[0]}." for parts in common)) + ".*"


def plan_growth(checkpoint: Checkpoint, request: GrowthRequest) -> Plan:
    """The plan of a request; see :func:`build_plan`."""
    return build_plan(
        checkpoint,
        request.operators(),
        symmetry=request.symmetry_choice(),
        target=request.format,
        asked=request.flags(),
        drop=request.drop_tensors,
        part=request.part,
        warm_start=request.warm_start_choice(),
    )


def build_conversion_plan(
    checkpoint: Checkpoint, conversion: Operator, *, symmetry: Symmetry | None = None
) -> Plan:
    """Decide what every tensor of the converted checkpoint is made of.

    Args:
        checkpoint: opened source; only headers and config are read.
        conversion: to what.
        symmetry: how copies of a unit share its weight, and the seed of new weights.

    Raises:
        UsageError: the model cannot be converted that way.
        CheckpointError: tensors that the family does not declare, or with wrong shapes.
    """
    source_family, source_sizes = read_source(checkpoint)
    check_copies_only(checkpoint, "a conversion")
    if source_family.unread:
        raise UsageError(
            f"{source_family.unread[0]!r} belongs to layers that the class does not read "
            "(multi-token prediction), and no other attention is known for them.",
            "Drop them first: growkit grow with --drop-tensors.",
        )
    shape = ModelShape(source_family, source_sizes, checkpoint.config)
    step = conversion.apply(shape)
    family = family_of(step.config)
    sizes = family.sizes(step.config)
    if family.ties_by_values:
        sizes["tied"] = source_sizes["tied"]  # what the source stores decides, not its config
    effect = replace(
        step,
        steps=(replace(step, operator="convert"),),
        sizes=sizes,
        stacks=kept_layers((stack.axis for stack in family.stacks), sizes),
    )
    if effect.exactness is not Exactness.NOT_EXACT:
        check_links(shape, family, effect)
    builder = PlanBuilder(checkpoint, source_family, family, source_sizes, effect, step.config)
    return plan_of(builder, symmetry or Symmetry())


def read_source(checkpoint: Checkpoint, part: str | None = None) -> tuple[Family, dict[str, int]]:
    """Family and sizes of a source whose tensors are the declared ones.

    Args:
        part: of a multimodal model, the tower that grows.

    Raises:
        UsageError: quantised weights or an unknown family.
        CheckpointError: tensors that the family does not declare, or with wrong shapes.
    """
    check_unquantised(checkpoint)
    family = (
        family_of(checkpoint.config, checkpoint.tensors)
        if part in (None, "text")
        else family_of_tower(checkpoint.config, checkpoint.tensors, str(part))
    )
    sizes = family.sizes_of(checkpoint.config, checkpoint.tensors)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    family.check_tensors(shapes, sizes, checkpoint.path)
    return family, sizes


def plan_of(builder: PlanBuilder, symmetry: Symmetry) -> Plan:
    """The plan that a builder's list of tensors makes, with what rounding does to it."""
    checkpoint, growth = builder.checkpoint, builder.growth
    tensors = PlannedTensors(builder)
    exactness = growth.exactness
    shared = shared_copies(tensors, growth)
    if any(group.first.lambda_change is not None for group in tensors.groups):
        exactness = exactness.worst(Exactness.EXACT)
    part_rounds = growth.expert_copies & (growth.expert_copies - 1)
    if builder.rounded or part_rounds or _rounds(symmetry, shared):
        exactness = exactness.worst(Exactness.ROUNDED)
    families = builder.source_family, builder.family
    return Plan(
        checkpoint=checkpoint,
        source_family=builder.source_family,
        family=builder.family,
        source_sizes=builder.source_sizes,
        growth=growth,
        config=dict(builder.config),
        tensors=tensors,
        symmetry=symmetry,
        exactness=exactness,
        warnings=_warnings(symmetry, growth, bool(shared), *families, checkpoint.config)
        + head_dim_note(builder.config, builder.source_sizes, growth)
        + tied_head_note(checkpoint, builder.source_family, builder.source_sizes),
    )


def _choose_family(
    source: Family, growth: Effect, config: Mapping[str, Any], target: str | None
) -> Family:
    if growth.family is not None:
        twin = FAMILIES[growth.family]
        if target not in (None, twin.name):
            raise UsageError(
                f"--format {target!r} cannot hold a {source.name} checkpoint with experts.",
                f"Leave --format out: it is written as {twin.name}.",
            )
        _check_refusal(twin, growth, config)
        return twin
    if target is not None:
        family = source if target == source.name else FAMILIES.get(target)
        convertible = (source.wider, source.name) if source.wider else (source.name,)
        if family is None or target not in convertible:
            raise UsageError(
                f"--format {target!r} cannot hold a {source.name} checkpoint.",
                f"Valid values: {', '.join(dict.fromkeys(convertible))}.",
            )
        if family is source:
            _check_refusal(family, growth, config)
        return family
    if source.wider and source.refusal(config, growth.sizes):
        wider = FAMILIES[source.wider]
        if refusal := wider.refusal(config, growth.sizes):
            raise UsageError(
                f"transformers would not load the grown model: {refusal}.", "Choose another size."
            )
        return wider
    _check_refusal(source, growth, config)
    return source


def _check_refusal(family: Family, growth: Effect, config: Mapping[str, Any]) -> None:
    config = {**config, **growth.fields}
    refusal = family.refusal(config, growth.sizes)
    if refusal:
        raise UsageError(
            f"transformers would not load the grown model: {refusal}.",
            f"Choose another size, or --format {family.wider}."
            if family.wider
            else sizes_that_load(family, config, growth.sizes, growth.axes),
        )


def shared_copies(tensors: PlannedTensors, growth: Effect) -> set[int]:
    """Numbers of copies that share the weight of what reads them; experts among them."""
    return _shared_among(tensors) | ({growth.expert_copies} - {1})


def _shared_among(tensors: PlannedTensors) -> set[int]:
    """Numbers of copies that weights are divided among."""
    dims = {dim for group in tensors.groups for dim in group.first.dims if dim is not None}
    counts = (set(np.unique(dim.multiplicity).tolist()) for dim in dims if dim.shares)
    return set().union(*counts) - {0, 1}


def _rounds(symmetry: Symmetry, shared: set[int]) -> bool:
    if symmetry.mode == "noise":
        return bool(shared)
    return symmetry.equal and any(count & (count - 1) for count in shared)


def _warnings(
    symmetry: Symmetry,
    growth: Effect,
    shared: bool,
    source: Family,
    family: Family,
    config: Mapping[str, Any],
) -> tuple[str, ...]:
    warnings = list(growth.warnings)
    if family is not source and not growth.converts:
        held = source.refusal(config, growth.sizes) is None
        why = "asked for" if held else f"the {source.name} format cannot hold this model"
        if growth.family is not None:
            why = f"{source.name} has no experts"
        warnings.append(f"{why}: it is written as {family.name}")
    if symmetry.mode == "even" and shared:
        warnings.append(
            "even shares keep copies equal for ever (equal gradients): growth that is never used"
        )
    if symmetry.mode == "rms" and shared:
        warnings.append(
            "copies begin equal and part by the optimizer alone: train with new_warmup_steps, and "
            "with the optimizer state of the run before (else they stay equal for ever)"
        )
    if growth.tied:
        warnings.append(
            f"symmetry of copies: none: past 1:1 the {growth.noise_copies} copies of a noise head "
            "that a signal head subtracts have equal rows and one lambda, get equal gradients and "
            "training never parts them; no split of them is exact (--symmetry noise parts them "
            "by noise on their rows, which changes the function)"
        )
    if growth.perturbed:
        warnings.append(
            f"the copies of noise heads are parted by noise {symmetry.noise_snr_db:g} dB below "
            "their rows, which changes the function: its mean over the copies is zero, their "
            "attention maps are not linear in it"
        )
    return tuple(warnings)


CONFIG_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def declare_tensors(checkpoint: Checkpoint) -> None:
    """Fill ``checkpoint.tensors`` from the config, so that it can be planned but not read."""
    check_unquantised(checkpoint)
    family = family_of(checkpoint.config)
    sizes = family.sizes(checkpoint.config)
    declared = family.count(sizes)
    if declared > MAX_TENSORS:
        raise UsageError(
            f"config.json declares {declared} tensors.",
            f"growkit plans models with at most {MAX_TENSORS}: check the numbers of layers and "
            "experts.",
        )
    named = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    dtype = CONFIG_DTYPES.get(named, "F32")
    for name, shape in family.declared(sizes):
        nbytes = prod(shape) * DTYPES[dtype].bits // 8
        checkpoint.tensors[name] = TensorInfo(name, dtype, shape, "", 0, nbytes)
        checkpoint.total_size += nbytes
