"""A family's table against the class that it describes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from family_checkpoints import BIASES, FAMILIES, class_config, family_config
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from growkit.core.errors import CheckpointError
from growkit.families import family_of

HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}
CASES = [
    pytest.param(family, tied, kv, bias, id=f"{family}-{tied}-{kv}-{bias}")
    for family in FAMILIES
    for tied in ("tied", "untied")
    for kv in HEADS
    for bias in (("bias", "plain") if family in BIASES else ("plain",))
]


def class_shapes(config: dict[str, Any], *, disk: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the class stores, without allocating it.

    ``disk``: as ``save_pretrained`` writes them, otherwise as they are in memory.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(class_config(config))
    stored = dict(model.named_parameters(remove_duplicate=False))
    if disk:
        stored = revert_weight_conversion(model, stored)
    names = {name: tuple(p.shape) for name, p in stored.items()}
    return {n: s for n, s in names.items() if n not in model.all_tied_weights_keys}


@pytest.mark.parametrize(("family", "tied", "kv", "bias"), CASES)
def test_every_parameter_is_declared_once(family: str, tied: str, kv: str, bias: str) -> None:
    config = family_config(
        family,
        bias=bias == "bias",
        tie_word_embeddings=tied == "tied",
        num_key_value_heads=HEADS[kv],
        num_hidden_layers=2,
        head_dim=16,
    )
    table = family_of(config)
    sizes = table.sizes(config)
    declared = [(name, tensor.shape(sizes)) for tensor, _, name in table.names(sizes)]
    assert not [name for name, count in Counter(n for n, _ in declared).items() if count > 1]
    assert dict(declared) == class_shapes(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_fields_mean_what_the_class_means(family: str) -> None:
    """Published configs leave out what their class assumes."""
    config = family_config(family, num_attention_heads=64, hidden_size=1024)
    for name in ("num_key_value_heads", "head_dim", "tie_word_embeddings"):
        del config[name]
    table = family_of(config)
    sizes = table.sizes(config)
    assert {n: t.shape(sizes) for t, _, n in table.names(sizes)} == class_shapes(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_lists_follow_the_class(family: str) -> None:
    """What a table says for a list that config.json leaves out is what the class makes."""
    windows = {"use_sliding_window": True} if family in ("qwen2", "qwen3", "smollm3") else {}
    for layers in (1, 5, 13):
        config = family_config(family, num_hidden_layers=layers, **windows)
        real = class_config(config)
        for name in family_of(config).layer_rules:
            assert family_of(config).layer_list(config, name, layers) == getattr(real, name)
    made = {name for name in ("layer_types", "no_rope_layers") if hasattr(real, name)}
    assert made == set(family_of(config).layer_rules)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_that_lacks_or_invents_a_tensor_is_caught(family: str) -> None:
    config = family_config(family, num_hidden_layers=1)
    table = family_of(config)
    sizes = table.sizes(config)
    shapes = class_shapes(config)
    table.check_tensors(shapes, sizes)
    for tensor in table.tensors:
        if not tensor.when(sizes):
            continue
        lacking = replace(table, tensors=tuple(t for t in table.tensors if t is not tensor))
        name = tensor.name.replace("{layer}", "0").replace("{expert}", "0")
        with pytest.raises(CheckpointError, match=re.escape(name)):
            lacking.check_tensors(shapes, sizes)
    invented = replace(table.tensors[0], role="other", name="model.other.weight")
    with pytest.raises(CheckpointError, match=r"model\.other\.weight"):
        replace(table, tensors=(*table.tensors, invented)).check_tensors(shapes, sizes)


def objection(config: dict[str, Any]) -> str | None:
    table = family_of(config)
    return table.refusal(config, table.sizes(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_that_the_heads_do_not_divide(family: str) -> None:
    """The table objects exactly where the config class does."""
    config = family_config(family, num_attention_heads=6, num_key_value_heads=2)
    try:
        class_config(config)
        refused = False
    except Exception:
        refused = True
    assert bool(objection(config)) == refused
    assert objection(family_config(family)) is None


def test_phi3_long_context_factors() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    config = family_config("phi3", rope_parameters=rope, partial_rotary_factor=1.0)
    class_config(config)
    assert objection(config) is None
    wider = config | {"hidden_size": 64}
    with pytest.raises(Exception, match="short_factor"):
        class_config(wider)
    assert "Phi3Config wants 8 numbers" in str(objection(wider))
