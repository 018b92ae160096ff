"""Tables of the attention variants against the class that they describe."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod

import pytest
import torch
from variant_checkpoints import VARIANTS, variant_config

from growkit.core.errors import CheckpointError, UsageError
from growkit.families import FAMILIES, family_of
from growkit.modeling import GrowkitForCausalLM
from growkit.record.cost import cost_of

EVERY_VARIANT = pytest.mark.parametrize("name", VARIANTS)


def class_shapes(config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = GrowkitForCausalLM(config)
    names = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    return {n: s for n, s in names.items() if n not in model.all_tied_weights_keys}


@EVERY_VARIANT
@pytest.mark.parametrize("act", ["silu", "poly_norm"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_parameter_is_declared_once_and_counted(name, tied, act):
    real = variant_config(name, tie_word_embeddings=tied, hidden_act=act)
    config = real.to_dict()
    table = family_of(config)
    assert table.name == real.attention
    sizes = table.sizes(config)
    declared = [(key, tensor.shape(sizes)) for tensor, _, key in table.names(sizes)]
    assert dict(declared) == class_shapes(real) and len(dict(declared)) == len(declared)
    cost = cost_of(table, sizes, "BF16", 1024)
    assert cost.parameters == sum(prod(shape) for shape in class_shapes(real).values())


def test_a_simulation_costs_more_than_its_weights():
    """arXiv 2507.07694: 6d(HH'k + H'^2 k) + 4H'(dD' + D'^2) FLOPs a token, beside the biases."""
    config = variant_config("sas").to_dict()
    table = family_of(config)
    sizes = table.sizes(config)
    weights = tuple(t for t in table.tensors if "simulate" in t.role and t.role.endswith("weight"))
    without = replace(table, tensors=tuple(t for t in table.tensors if t not in weights))
    d, heads, simulated, kernel, wide = 8, 2, 4, 3, 12
    expected = 6 * d * (heads * simulated * kernel + simulated**2 * kernel)
    expected += 4 * simulated * (d * wide + wide**2)
    costs = [cost_of(family, sizes, "BF16", 64).flops_per_token for family in (table, without)]
    assert costs[0] - costs[1] == 3 * expected


@EVERY_VARIANT
def test_sizes_and_fields_are_inverse(name):
    config = variant_config(name).to_dict()
    table = family_of(config)
    sizes = table.sizes(config)
    assert {k: config[k] for k in table.config_fields(sizes)} == table.config_fields(sizes)


@EVERY_VARIANT
def test_a_table_that_lacks_a_tensor_is_caught(name):
    real = variant_config(name, num_hidden_layers=1)
    table, shapes = family_of(real.to_dict()), class_shapes(real)
    sizes = table.sizes(real.to_dict())
    table.check_tensors(shapes, sizes)
    for tensor in table.tensors:
        if tensor.when(sizes):
            lacking = replace(table, tensors=tuple(t for t in table.tensors if t is not tensor))
            with pytest.raises(CheckpointError, match=re.escape(tensor.name.format(layer=0))):
                lacking.check_tensors(shapes, sizes)


def test_the_field_attention_chooses_the_family():
    assert family_of({"model_type": "growkit"}) is FAMILIES["gqa"]  # the class's default
    with pytest.raises(UsageError, match=r"attention = 'diff_v3'.*\n?.*Did you mean 'diff_v"):
        family_of({"model_type": "growkit", "attention": "diff_v3"})
