"""Positions become names with certainty or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
from hypothesis import given
from hypothesis import strategies as st

from growkit.core.errors import CheckpointError
from growkit.optimizer_state.parameter_names import (
    Named,
    model_parameters,
    names_of_positions,
    plain_name,
)

NAMED: Named = [
    ("model.embed_tokens.weight", (256, 16)),
    ("model.layers.0.self_attn.q_proj.weight", (16, 16)),
    ("model.layers.0.self_attn.q_proj.bias", (16,)),
    ("model.layers.0.mlp.up_proj.weight", (12, 16)),
    ("model.layers.0.input_layernorm.weight", (16,)),
    ("model.norm.weight", (16,)),
    ("lm_head.weight", (256, 16)),
]


def positions(groups: list[list[str]]) -> tuple[list[dict[str, Any]], dict[int, tuple[int, ...]]]:
    shapes, result, position = dict(NAMED), [], 0
    by_position = {}
    for names in groups:
        result.append({"params": list(range(position, position + len(names)))})
        for name in names:
            by_position[position] = shapes[name]
            position += 1
    return result, by_position


def named(groups: list[list[str]], **options: Any) -> list[str]:
    made, shapes = positions(groups)
    for group, names in zip(made, options.get("stored", []), strict=False):
        group["param_names"] = names
    for missing in options.get("missing", []):
        del shapes[missing]
    found = names_of_positions(made, shapes, lambda: NAMED, "optimizer.pt")
    return [found[i] for i in range(len(found))]


def split(rule: Any) -> list[list[str]]:
    return [[n for n, s in NAMED if rule(n, s)], [n for n, s in NAMED if not rule(n, s)]]


@pytest.mark.parametrize(
    "rule",
    [
        lambda n, s: "norm" not in n and "bias" not in n,  # Trainer
        lambda n, s: len(s) > 1,
        lambda n, s: len(s) > 1 and "embed" not in n,
        lambda n, s: len(s) > 1 and "embed" not in n and "lm_head" not in n,
        lambda n, s: len(s) < 2,  # the other group first
        lambda n, s: s == (16,) or s == (12, 16),  # unusual, but shapes decide
        lambda n, s: True,
    ],
)
def test_groupings(rule: Any) -> None:
    groups = split(rule)
    assert named(groups) == [name for group in groups for name in group]


def test_parameters_without_state_take_their_place() -> None:
    groups = split(lambda n, s: len(s) > 1)
    assert named(groups, missing=[1, 5]) == [name for group in groups for name in group]


def test_several_ways_are_refused() -> None:
    """q_proj.bias and the norms have one shape: which of them stands alone is not known."""
    groups = split(lambda n, s: n != "model.norm.weight")
    with pytest.raises(CheckpointError, match=r"6 \+ 1 parameters .* in no known way"):
        named(groups)


@given(st.permutations([name for name, _ in NAMED]), st.integers(1, 6))
def test_stored_names_need_no_model(order: list[str], cut: int) -> None:
    groups = [order[:cut], order[cut:]]
    stored = [["module." + name for name in group] for group in groups]
    assert named(groups, stored=stored) == order


@given(st.sets(st.sampled_from([name for name, _ in NAMED]), min_size=1, max_size=6))
def test_any_grouping_is_right_refused_or_looks_usual(chosen: set[str]) -> None:
    """The limit of positions alone: a grouping with the sizes and shapes of a usual one."""
    groups = split(lambda name, shape: name in chosen)
    try:
        found = named(groups)
    except CheckpointError:
        return
    shapes, wanted = dict(NAMED), [name for group in groups for name in group]
    assert [shapes[n] for n in found] == [shapes[n] for n in wanted]
    if found != wanted:
        first = set(found[: len(groups[0])])
        usual = [
            {n for n, s in NAMED if len(s) > 1 and "embed" not in n},
            {n for n, s in NAMED if len(s) < 2 or "embed" in n},
        ]
        assert first in usual


def test_wrappers() -> None:
    assert plain_name("_orig_mod.module.model.layers.0._fsdp_wrapped_module.q.weight") == (
        "model.layers.0.q.weight"
    )
    assert plain_name("model.module_list.weight") == "model.module_list.weight"


def test_model_order_with_tied_weights_once(tmp_path: Path) -> None:
    config = tiny.llama_config(4, 2, tie_word_embeddings=True)
    folder = tiny.make_folder(tmp_path / "a", config)
    found = model_parameters(folder)
    assert dict(found) == tiny.shapes(config)
    assert found[0][0] == "model.embed_tokens.weight" and found[-1][0] == "model.norm.weight"
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(CheckpointError, match="order of the parameters"):
        model_parameters(folder)
