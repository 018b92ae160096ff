"""A plan as plain data: what ``plan --json``, the manifest and the tables are made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from growkit.checkpoint import Checkpoint
from growkit.record.cost import Cost, cost_of
from growkit.surgery.effect import NO_LAYER
from growkit.surgery.operators import axis_labels
from growkit.surgery.plan import Plan, shared_copies

DEFAULT_CONTEXT = 2048


def main_dtype(dtypes: dict[str, int]) -> str:
    """The dtype that most bytes are stored in."""
    return max(dtypes, key=lambda name: dtypes[name])


def stored_dtypes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of a checkpoint by dtype."""
    totals: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        totals[info.dtype] += info.nbytes
    return dict(totals)


def cost_context(config: Mapping[str, Any]) -> int:
    """The context length at which costs are stated: 2048, or the model's where it is shorter."""
    stated = config.get("max_position_embeddings") or config.get("n_positions")
    return min(int(stated or DEFAULT_CONTEXT), DEFAULT_CONTEXT)


def costs(plan: Plan) -> tuple[Cost, Cost]:
    """Cost of the source and of the grown model, at the same context."""
    dtype = main_dtype(stored_dtypes(plan.checkpoint))
    context = cost_context(plan.config)
    source = plan.source_family, plan.source_sizes
    before = cost_of(*source, dtype, context, plan.checkpoint.config)
    return before, cost_of(plan.family, plan.sizes, dtype, context, plan.config)


def plan_report(plan: Plan) -> dict[str, Any]:
    """Everything that ``growkit plan`` says, as JSON-able data."""
    before, after = costs(plan)
    actions: Counter[str] = Counter()
    for group in plan.tensors.groups:
        actions[group.first.told] += group.count
    stacks = plan.growth.stacks.values()
    # A dense FFN is one expert that every token meets; a head of another kind there is not.
    absent = 0 if plan.growth.converts else 1
    source_sizes = dict(plan.source_sizes)
    if not plan.growth.converts:  # the FFN of layers that stay without experts
        for axis, alias in plan.growth.aliases.items():
            source_sizes.setdefault(axis, source_sizes[alias.axis])
    inserted = sum(layer.kind == "identity" for layers in stacks for layer in layers)
    return {
        "source_family": plan.source_family.name,
        "family": plan.family.name,
        **({"family_origin": plan.family.origin} if plan.family.origin else {}),
        "operators": [
            {
                "operator": step.operator,
                "summary": step.summary,
                "exactness": step.exactness.value,
                "reason": step.reason,
            }
            for step in plan.growth.steps
        ],
        "axes": {
            axis: {
                "label": label,
                "before": source_sizes.get(axis, absent),
                "after": plan.sizes.get(axis, absent),
            }
            for axis, label in axis_labels(plan.sizes).items()
            if axis in plan.sizes or axis in source_sizes
        },
        "tied_embeddings": {
            "before": bool(plan.source_sizes["tied"]),
            "after": bool(plan.sizes["tied"]),
        },
        "before": before.to_dict(),
        "after": after.to_dict(),
        "bytes_in": plan.checkpoint.total_size,
        "bytes_out": plan.total_bytes,
        "tensors": {
            "total": len(plan.tensors),
            **{action: actions[action] for action in sorted(actions)},
        },
        "inserted_layers": inserted,
        **layer_sources(plan),
        # The first channels of the grown residual stream are the old ones times this.
        "hidden_factor": plan.growth.stream_factor,
        # Numbers of copies that share the weight of what reads them.
        "shared_copies": sorted(shared_copies(plan.tensors, plan.growth)),
        "symmetry": plan.symmetry.mode,
        # Axes whose copies stay equal whatever the symmetry.
        "tied_copies": list(plan.growth.tied),
        "noise_snr_db": plan.symmetry.noise_snr_db if plan.symmetry.mode == "noise" else None,
        **({"warm_start": asdict(plan.growth.warm_start)} if plan.growth.warm_start else {}),
        "seed": plan.symmetry.seed,
        "exactness": plan.exactness.value,
        "warnings": list(plan.warnings),
    }


def layer_sources(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """``layer_sources``: what each layer is made of; one such list for each stack of layers."""
    return {
        f"{stack}_sources": [
            {"source": None if layer.source == NO_LAYER else layer.source, "kind": layer.kind}
            | ({} if layer.partner == NO_LAYER else {"partner": layer.partner})
            for layer in layers
        ]
        for stack, layers in plan.growth.stacks.items()
    }


def tensor_report(plan: Plan) -> list[dict[str, Any]]:
    """One entry a written tensor: source, action and shapes."""
    entries = []
    for tensor in plan.tensors:
        info = plan.checkpoint.tensors.get(tensor.source or "")
        entries.append(
            {
                "name": tensor.output.name,
                "action": tensor.told,
                "dtype": tensor.output.dtype,
                "shape": list(tensor.output.shape),
                "source": tensor.source,
                "source_shape": list(info.shape) if info else None,
                "bytes": tensor.nbytes,
            }
        )
    return entries
