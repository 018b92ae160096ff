"""A plan costs what its kinds of tensors cost: counts, no timing."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest

from growkit.advice import facts_of_plan
from growkit.advice.memory import training_memory
from growkit.checkpoint import open_checkpoint
from growkit.record.new_parameters import new_parameters
from growkit.surgery import plan_builder
from growkit.surgery.plan import Plan, build_plan, declare_tensors
from growkit.surgery.request import GrowthRequest

MIXTURE = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 24,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
DENSE = {**MIXTURE, "model_type": "qwen3"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "experts": (MIXTURE, {"experts": "x8"}),
    "hidden": (MIXTURE, {"hidden": "x16"}),
    "all": (MIXTURE, {"experts": "x2", "hidden": "x2", "heads": "x2", "layers": "+2", "ffn": "x2"}),
    "of an FFN": (DENSE, {"experts": "8", "ffn": "48"}),
    "dense": (DENSE, {"query_heads": "x2", "layers": "x2"}),
}


def planned(folder: Path, config: dict[str, Any], request: dict[str, Any]) -> Plan:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    asked = GrowthRequest(**request)
    with open_checkpoint(folder, require_tensors=False) as checkpoint:
        declare_tensors(checkpoint)
        return build_plan(checkpoint, asked.operators(), symmetry=asked.symmetry_choice())


@pytest.mark.parametrize("name", CASES)
def test_kinds_are_what_the_tensors_are_one_by_one(tmp_path: Path, name: str) -> None:
    plan = planned(tmp_path / "a", *CASES[name])
    tensors = tuple(plan.tensors)
    by_kind: Counter[Any] = Counter()
    for group in plan.tensors.groups:
        first = group.first
        by_kind[first.action, first.role, first.layer, first.output.shape] += group.count
    assert by_kind == Counter((t.action, t.role, t.layer, t.output.shape) for t in tensors)
    assert len(plan.tensors) == len(tensors) == len({t.output.name for t in tensors})
    assert plan.total_bytes == sum(tensor.nbytes for tensor in tensors)
    assert plan.tensors[-1] == tensors[-1] and plan.tensors[2:5] == tensors[2:5]
    facts = facts_of_plan(plan)
    shapes = {t.output.name: t.output.shape for t in tensors}
    assert facts.parameters == sum(map(prod, shapes.values()))
    memory = training_memory(shapes, new_parameters(plan), facts.setup)
    assert memory == training_memory(facts.shapes, facts.new, facts.setup, facts.counts)
    assert facts.new.items() <= new_parameters(plan).items()


def test_maps_and_plans_do_not_grow_with_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = plan_builder.map_dim

    def counted(*arguments: Any) -> Any:
        made[-1] += 1
        return real(*arguments)

    monkeypatch.setattr(plan_builder, "map_dim", counted)
    groups = []
    for experts in (8, 64):
        made.append(0)
        config = {**MIXTURE, "num_experts": experts}
        plan = planned(tmp_path / str(experts), config, {"hidden": "x4", "experts": "x4"})
        groups.append(len(plan.tensors.groups))
        distinct = {dim for tensor in plan.tensors for dim in tensor.dims if dim is not None}
        assert len(distinct) <= made[-1] <= 16
    assert made[0] == made[1] and groups[0] == groups[1] < 150
