"""Two folders of one family, explained: by the plan that grew one from the other, or by entries.

Everything is streamed in blocks of about a megabyte; no torch, nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from growkit.checkpoint import Checkpoint
from growkit.core.errors import UsageError
from growkit.diff.difference import compare_tensors
from growkit.diff.explain import dim_parts, explain
from growkit.diff.groups import Group
from growkit.diff.recorded_plan import recorded_plan
from growkit.record.plan_report import layer_sources
from growkit.surgery.plan import Plan
from growkit.surgery.tensor_plans import TensorPlan

Advance = Callable[[float], None]
# No model has 10^9 layers, and Python refuses to read a number of 5,000 digits.
LAYER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")
EXPERT = re.compile(r"(?<=\.experts\.)[0-9]{1,9}(?=\.)")


def diff_checkpoints(
    a: Checkpoint, b: Checkpoint, advance: Advance = lambda amount: None
) -> dict[str, Any]:
    """Explain how ``b`` differs from ``a``.

    With a growkit.json in ``b`` that names ``a`` as its parent, the plan is made again and every
    written part is compared with what the plan makes of the source. Otherwise tensors of equal
    names are compared entry by entry.

    Args:
        a: one folder, the parent where there is one.
        b: the other.
        advance: told the bytes of ``b`` that are done.

    Returns:
        JSON-able: ``mode`` (``growth`` or ``tensors``), ``operators`` (of the plan), ``as_grown``
        (every part is what the plan says; None without a plan), ``layer_sources`` (of the
        plan; None without), ``identical``, ``notes`` and ``groups`` (see :class:`Group`).

    Raises:
        UsageError: the folders hold different architectures.
    """
    notes: list[str] = []
    plan = recorded_plan(a, b, notes)
    if plan is None:
        kinds = [checkpoint.config.get("model_type") for checkpoint in (a, b)]
        if kinds[0] != kinds[1]:
            raise UsageError(
                f"A is a {kinds[0]!r} and B a {kinds[1]!r} checkpoint.",
                "growkit diff compares two folders of one family, or a folder with what was grown "
                "from it.",
            )
    found = _by_plan(plan, b, advance) if plan else _by_name(a, b, advance)
    groups: dict[str, Group] = {}
    for group in found:
        known = groups.setdefault(group.key, group)
        if known is not group:
            known.add(group)
    changed = [group for group in groups.values() if group.difference.differing]
    same = not changed and all(g.status == "unchanged" for g in groups.values())
    return {
        "mode": "growth" if plan else "tensors",
        "family": a.config.get("model_type"),
        "operators": [step.summary for step in plan.growth.steps] if plan else [],
        **(layer_sources(plan) if plan else {"layer_sources": None}),
        "as_grown": _as_grown(plan, list(groups.values())) if plan else None,
        "identical": same if plan is None else False,
        "notes": notes,
        "groups": [group.to_dict() for group in groups.values()],
    }


def _pattern(name: str) -> str:
    """A tensor's name without the numbers of its layer and expert."""
    return EXPERT.sub("{expert}", LAYER.sub("{layer}", name, count=1))


def _by_plan(plan: Plan, b: Checkpoint, advance: Advance) -> list[Group]:
    groups = []
    for tensor in plan.tensors:
        info = plan.checkpoint.tensors.get(tensor.source or "")
        layer = tensor.layer_source
        groups.append(
            Group(
                tensor.output.name if layer is None else _pattern(tensor.output.name),
                tensor.action.value,
                [] if tensor.layer is None else [tensor.layer],
                [] if layer is None else [layer.source],
                tensor.in_new_layer,
                (info.shape if info else None, tensor.output.shape),
                _dims(tensor),
                tensor.factor,
                explain(plan, tensor, b),
                *_expert(plan, tensor),
            )
        )
        advance(b.tensors[tensor.output.name].nbytes)
    return groups


def _expert(plan: Plan, tensor: TensorPlan) -> tuple[list[int], list[int], bool, int]:
    """(experts, their sources, further copies, copies that share) of one written tensor."""
    shared = tensor.share.copies if tensor.share else 1
    if tensor.expert is None:
        return [], [], False, shared
    axis = plan.growth.axes.get("expert")
    source = tensor.expert if axis is None else int(axis.source[tensor.expert])
    return [tensor.expert], [source], tensor.expert_copy, shared


def _dims(tensor: TensorPlan) -> dict[str, dict[str, Any]]:
    labels = tensor.dim_labels if len(tensor.dims) > 1 else ("entries",)
    return {
        label: {"shared": dim.shares or dim.perturbed is not None, **dim_parts(dim)}
        for label, dim in zip(labels, tensor.dims, strict=False)
        if dim is not None and not tensor.action.all_new
    }


def _as_grown(plan: Plan, groups: list[Group]) -> bool:
    """Nothing but rounding of shares stands between the files and the plan."""
    rounded = plan.exactness.value == "rounded" or plan.symmetry.mode == "noise"
    return not any(
        group.difference.differing
        for group in groups
        if not (rounded and any(dim["shared"] for dim in group.dims.values()))
    )


def _by_name(a: Checkpoint, b: Checkpoint, advance: Advance) -> list[Group]:
    groups = []
    for name in [*b.tensors, *(n for n in a.tensors if n not in b.tensors)]:
        match = LAYER.search(name)
        layers = [int(match[0])] if match else []
        info_a, info_b = a.tensors.get(name), b.tensors.get(name)
        group = Group(_pattern(name), "unchanged", layers, list(layers))
        if expert := EXPERT.search(name):
            group.experts, group.expert_sources = [int(expert[0])], [int(expert[0])]
        group.shapes = (info_a.shape if info_a else None, info_b.shape if info_b else None)
        if info_b is None or info_a is None:
            group.status = "only in A" if info_b is None else "only in B"
        elif info_a.shape != info_b.shape:
            group.status = "shape"
        else:
            group.difference = compare_tensors(a, name, b, name)
            group.status = "different" if group.difference.differing else "unchanged"
        groups.append(group)
        advance(info_b.nbytes if info_b else 0)
    return groups
