"""Which parameters are new: tensor -> row and column ranges. Training freezes or speeds by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from growkit.surgery.dim_map import DimMap
from growkit.surgery.plan import Plan
from growkit.surgery.tensor_plans import TensorPlan


def new_parameters(plan: Plan, tensors: Iterable[TensorPlan] | None = None) -> dict[str, Any]:
    """Map from written tensor to what in it has no old counterpart; ``tensors``: of these alone.

    The value is ``"all"`` for a tensor of an inserted layer, of a further copy of an expert, or one
    without a source; otherwise an object with ``rows`` and/or ``columns`` (and ``experts`` of a
    stack [experts, rows, columns]): lists of [start, end) element ranges that hold further copies
    or new units (the first copy of a unit counts as the old one). Tensors without new parts are
    absent. Names are those on disk: transformers stacks the experts of a layer when it loads them.
    """
    result: dict[str, Any] = {}
    known: dict[tuple[DimMap | None, ...], dict[str, Any]] = {}
    for tensor in plan.tensors if tensors is None else tensors:
        part = _new_part(plan, tensor, known)
        if part:
            result[tensor.output.name] = part
    return result


def _new_part(
    plan: Plan, tensor: TensorPlan, ranges: dict[tuple[DimMap | None, ...], dict[str, Any]]
) -> Any:
    """``ranges`` are those of the maps met before: tensors with the same maps share one entry."""
    if tensor.computed is not None:
        # Made of old weights, or a tensor that the source's attention has not.
        known = plan.source_family.tensor(tensor.role)
        return {} if known is not None and known.when(plan.source_sizes) else "all"
    if tensor.redrawn and tensor.expert is not None:
        return "all"  # a mixture of old and new: none of the experts is the old FFN
    if tensor.source is None or tensor.expert_copy or tensor.action in ("zero", "closed"):
        return "all"
    if tensor.in_new_layer:
        return "all"
    if tensor.dims not in ranges:
        ranges[tensor.dims] = {
            label: [list(r) for r in dim.new_ranges]
            for label, dim in zip(tensor.dim_labels, tensor.dims, strict=True)
            if dim is not None and dim.new_ranges
        }
    return ranges[tensor.dims]
