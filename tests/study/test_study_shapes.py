"""Shapes, steps and FLOPs of a study, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_studies import STEP, TINY_GDA, nodes_of, study_of, values

from growkit.core.errors import UsageError
from growkit.growing import grow_checkpoint
from growkit.study.nodes import Nodes
from growkit.study.shapes import NO_SHAPE
from growkit.surgery.request import GrowthRequest

GROWTHS: dict[str, dict[str, Any]] = {
    "signal": {"signal_heads": "x2"},
    "hidden": {"hidden": "x2"},
    "depth": {"layers": "x2", "depth_method": "stack"},
    "ffn": {"ffn": "+8"},
}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    arms: dict[str, Any] = values()["arms"]
    for name, grow in GROWTHS.items():
        arms[name] = {"base": "small", "grow": grow}
        arms[f"scratch-{name}"] = {"shape_of": name}
    arms["twice"] = {"base": "wider", "grow": {"ffn": "x2"}}
    bases = values()["bases"] | {
        "wider": {"base": "small", "grow": {"signal_heads": "x2"}, "tokens": 2 * STEP}
    }
    study = study_of(bases=bases, arms=arms)
    return nodes_of(tmp_path_factory.mktemp("shapes") / "study", study)


@pytest.mark.parametrize("name", GROWTHS)
def test_shape_of_is_the_grown_shape(nodes: Nodes, name: str, tmp_path: Path) -> None:
    """From scratch in an arm's shape: the very config that the growth writes."""
    grown, scratch = nodes.shapes.of(name), nodes.shapes.of(f"scratch-{name}")
    assert scratch.config == grown.config and scratch.key == grown.key
    assert scratch.parameters == grown.parameters
    assert scratch.flops_per_token == grown.flops_per_token
    small = nodes.shapes._drafted(nodes.study.bases["small"])
    request = GrowthRequest.from_mapping(GROWTHS[name])
    grow_checkpoint(small, tmp_path / "grown", request, verify=False)
    written = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert grown.config == {k: v for k, v in written.items() if k not in NO_SHAPE}
    assert grown.key != nodes.shapes.of("on").key


def spent(nodes: Nodes, name: str) -> float:
    """FLOPs over all phases of an arm, each counted by itself."""
    before, _ = nodes.lengths.before(name)
    return before + nodes.lengths.steps(name) * STEP * nodes.shapes.of(name).flops_per_token


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.floats(1e7, 1e12), st.integers(1, 50))
def test_no_arm_spends_more_than_the_budget_or_a_step_less(
    nodes: Nodes, budget: float, steps: int
) -> None:
    base = values()["bases"]["small"] | {"tokens": steps * STEP}
    bases = values()["bases"] | nodes.study.to_dict()["bases"] | {"small": base}
    arms = nodes.study.to_dict()["arms"]
    study = study_of(bases=bases, arms=arms, budget={"training_flops": budget})
    other = Nodes(
        study, nodes.shapes, nodes.records, nodes.fingerprints, nodes.tokenizer, nodes.cache
    )
    assert other.lengths.steps("small") == steps  # counted in tokens: exactly those
    for name in arms:
        try:
            flops = spent(other, name)
        except UsageError:
            assert budget < other.lengths.before(name)[0] + other.lengths.flops_per_step(name)
            continue
        assert budget - other.lengths.flops_per_step(name) < flops <= budget * (1 + 1e-11)


def test_a_budget_in_tokens_is_that_of_its_arm(nodes: Nodes) -> None:
    assert nodes.lengths.budget == 12 * STEP * nodes.shapes.of("on").flops_per_token
    lengths = nodes.lengths
    assert (lengths.steps("small"), lengths.steps("on"), lengths.before("on")[1]) == (6, 6, 6)


def test_a_budget_that_the_base_has_used_up_is_refused(nodes: Nodes) -> None:
    def asked(tokens: int, name: str = "on", **changes: Any) -> None:
        study = study_of(budget={"tokens": tokens, "arm": "on"}, **changes)
        Nodes(study, nodes.shapes, nodes.records, {}, nodes.tokenizer, nodes.cache).check(name)

    with pytest.raises(UsageError, match="'on' has nothing left to train on: its base spent"):
        asked(6 * STEP)
    with pytest.raises(UsageError, match="less than one step"):
        asked(7 * STEP - 1)
    rates = values()["training"] | {"learning_rate": [1e-3, 1e-2]}
    with pytest.raises(UsageError, match="A trial of the learning rate of 'on'"):
        asked(9 * STEP, training=rates)
    with pytest.raises(UsageError, match=r"'scratch'.*warmup_steps \(40\)"):
        asked(12 * STEP, "scratch", training=values()["training"] | {"warmup_steps": 40})
    asked(12 * STEP)


def test_decay_is_a_part_of_the_whole_budget_and_may_be_absent(nodes: Nodes) -> None:
    def decay(**training: Any) -> int:
        study = study_of(training=values()["training"] | training)
        other = Nodes(
            study, nodes.shapes, nodes.records, nodes.fingerprints, nodes.tokenizer, nodes.cache
        )
        return int(other.node("signal", 0).recipe["training"]["decay_steps"])

    whole = nodes.lengths.budget / nodes.lengths.flops_per_step("signal")
    assert decay(decay_steps=0.25) == round(0.25 * whole) == decay(decay_steps="2.5e-1")
    assert decay(decay_steps=0) == 0
    assert decay(decay_steps=2) == 2
    assert decay(decay_steps=0.99) == nodes.lengths.steps("signal")


def test_tiny_config_is_what_the_arms_begin_with(nodes: Nodes) -> None:
    config = nodes.shapes.of("small").config
    assert {key: config[key] for key in TINY_GDA} == TINY_GDA
