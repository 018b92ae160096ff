"""GrowkitConfig: round trips, sizes in closed form, and refusals that name the fields."""

from __future__ import annotations

import json
import math

import pytest
from family_counts import kv_elements, parameters
from variant_cases import CASES, config_of, model_of, tokens

from growkit.families.lambda_schedule import lambda_init_schedule
from growkit.modeling import GrowkitConfig
from growkit.variants.attentions import VARIANTS

EVERY_CASE = pytest.mark.parametrize("case", CASES)
E, D, H = 32, 8, {case: fields["num_attention_heads"] for case, fields in CASES.items()}
G = {case: fields["num_key_value_heads"] for case, fields in CASES.items()}

# (parameters, cached elements a token) of one attention layer without biases and head norms, by the
# formulas of the docstrings.
CLOSED = {
    "mha": (E * D * (2 * 4 + 2 * 4), 2 * 4 * D),
    "gqa": (E * D * (2 * 4 + 2 * 2), 2 * 2 * D),
    "mqa": (E * D * (2 * 4 + 2 * 1), 2 * 1 * D),
    "diff_v1": (E * D * (2 * 8 + 2 * 4) + 4 * D + 2 * D, 2 * 4 * D),
    "diff_v1-plain": (E * D * (2 * 4 + 2 * 2) + 4 * D, 2 * 2 * D),
    "diff_v2": (E * D * (3 * 4 + 2 * 2) + E * 4, 2 * 2 * D),
    "diff_v2-normed": (E * D * (3 * 2 + 2 * 2) + E * 2, 2 * 2 * D),
    "gda_gated": (E * (8 * D + 2 * 2 * D + 6 * D + 6), 2 * 2 * D),
    "gda_gated-mqa": (E * (6 * D + 2 * 1 * D + 4 * D + 4), 2 * 1 * D),
    "shared_diff": (
        E * D * (4 + 2 + 4 + 8) + 2 * (4 * 3 + 2 * 2) * (E + D) + 4 * D + 2 * D,
        2 * 4 * D,
    ),
    "shared_diff-plain": (
        E * D * (2 + 1 + 2 + 4) + 2 * (2 * 2 + 1 * 1) * (E + D) + 4 * D,
        2 * 2 * D,
    ),
    "shared_diff-q": (
        E * D * (4 + 2 + 2 + 4) + 2 * 4 * 3 * (E + D) + 4 * D + D,
        2 * 2 * D,
    ),
    "shared_diff-q-plain": (
        E * D * (2 + 2 + 2 + 2) + 2 * 2 * 2 * (E + D) + 4 * D,
        2 * 2 * D,
    ),
    "wgqa": (4 * E * D * 4 + 2 * 4, 2 * 2 * D),
    "wgqa-column": (4 * E * D * 4 + 2 * 4 * D, 2 * 1 * D),
    "wgqa-row": (4 * E * D * 6 + 2 * 6 * E, 2 * 2 * D),
    "sas": (
        E * D * 8 + 6 * (2 * 3 + 2 * 2 * 3) + 3 * 6 * (6 * 3 + 2) + 2 * 12 * (D + 12 + 2),
        6 * (12 + D),
    ),
    "sas-linear": (
        E * D * 12 + 4 * (4 + 2 * 2) + 3 * 4 * (4 + 2) + 2 * 8 * (D + 8 + 2),
        4 * (8 + D),
    ),
    "unilm_diff_v1": (E * D * (2 * 4 + 2 * 2) + 4 * D + 2 * D, 2 * 2 * D),
}


def test_every_variant_has_a_case():
    assert {config_of(case).attention for case in CASES} == set(VARIANTS)


@EVERY_CASE
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_closed_forms_count_the_real_model(case, tied):
    config = config_of(case, tie_word_embeddings=tied)
    model = model_of(case, tie_word_embeddings=tied)
    assert sum(p.numel() for p in model.parameters()) == parameters(config)
    layer = model.model.layers[0].self_attn
    optional = sum(
        p.numel()
        for name, p in layer.named_parameters()
        if name in {f"{x}_proj.bias" for x in "qkvo"} | {"q_norm.weight", "k_norm.weight"}
    )
    counted, elements = CLOSED[case]
    assert parameters(config, "layers.0.self_attn") == counted + optional
    assert kv_elements(config) == elements
    cache = model(tokens(1, 5), use_cache=True).past_key_values
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cached == 5 * 4 * config.num_hidden_layers * kv_elements(config)


@EVERY_CASE
def test_json_round_trip_keeps_every_field(case, tmp_path):
    config = config_of(case, rope_theta=5e5, growkit={"lineage": ["a"]})
    config.save_pretrained(tmp_path)
    assert GrowkitConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["attention"] == config.attention
    assert stored["num_key_value_heads"] == config.num_key_value_heads
    assert stored["rope_parameters"]["rope_theta"] == 5e5


def test_defaults():
    config = GrowkitConfig()
    assert (config.attention, config.head_dim, config.num_key_value_heads) == ("gqa", 128, 16)
    config = GrowkitConfig(attention="diff_v1", num_hidden_layers=3)
    assert config.lambda_init == lambda_init_schedule(3, "diff")
    assert config.sub_layer_norm
    assert GrowkitConfig(attention="diff_v2").num_key_value_heads == 8
    gated = GrowkitConfig(attention="gda_gated", num_noise_heads=4)
    assert gated.num_key_value_heads == 4


REFUSED = [
    ("gqa", {"attention": "linear"}, ["attention = 'linear'", "diff_v2", "gqa"]),
    ("gqa", {"num_key_value_heads": 3}, ["num_key_value_heads = 3", "[1, 2, 4]"]),
    ("gqa", {"num_key_value_heads": 0}, ["num_key_value_heads = 0", "positive"]),
    ("gqa", {"num_noise_heads": 2}, ["num_noise_heads = 2", "attention = 'gqa'", "gda_gated"]),
    ("gqa", {"sub_layer_norm": True}, ["sub_layer_norm = True", "diff_v1"]),
    ("diff_v2", {"lambda_init": [0.2, 0.3]}, ["lambda_init", "diff_v1"]),
    ("gqa", {"head_dim": 7}, ["head_dim = 7", "even"]),
    (
        "gqa",
        {"head_dim": None, "num_attention_heads": 6, "num_key_value_heads": 2},
        ["head_dim", "hidden_size = 32", "num_attention_heads = 6"],
    ),
    ("gqa", {"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "silu", "poly_norm"]),
    ("gqa", {"attention_dropout": 0.1}, ["attention_dropout = 0.1", "0.0"]),
    ("gqa", {"num_hidden_layers": -1}, ["num_hidden_layers = -1"]),
    ("diff_v1", {"num_attention_heads": 7}, ["num_attention_heads = 7", "even"]),
    ("diff_v1", {"num_key_value_heads": 1}, ["num_key_value_heads = 1", "even"]),
    ("diff_v1", {"num_key_value_heads": 6}, ["num_key_value_heads = 6", "[2, 4, 8]"]),
    ("diff_v1", {"lambda_init": [0.2]}, ["lambda_init has 1", "num_hidden_layers = 2"]),
    ("diff_v1", {"lambda_init": [0.2, math.nan]}, ["lambda_init[1] = nan", "finite"]),
    ("diff_v1", {"lambda_init": [1.0, 0.2]}, ["lambda_init[0] = 1", "sub_layer_norm"]),
    ("diff_v2", {"num_attention_heads": 7}, ["num_attention_heads = 7", "even"]),
    ("diff_v2", {"num_key_value_heads": 8}, ["num_key_value_heads = 8", "[1, 2, 4]"]),
    ("gda_gated", {"num_noise_heads": 3}, ["num_noise_heads = 3", "[1, 2, 4]"]),
    ("gda_gated", {"num_noise_heads": None}, ["num_noise_heads = None", "[1, 2, 4]"]),
    ("gda_gated", {"num_key_value_heads": 4}, ["num_key_value_heads = 4", "[1, 2]"]),
    ("shared_diff", {"query_rank": None}, ["query_rank = None", "between 1 and", "head_dim = 8"]),
    ("shared_diff", {"key_rank": None}, ["key_rank = None", "between 0 and"]),
    ("shared_diff", {"query_rank": 9}, ["query_rank = 9", "head_dim = 8"]),
    ("shared_diff", {"num_key_value_heads": 3}, ["num_key_value_heads = 3", "even"]),
    ("shared_diff-q", {"num_attention_heads": 7}, ["num_attention_heads = 7", "even"]),
    ("shared_diff-q", {"num_key_value_heads": 8}, ["num_key_value_heads = 8", "[1, 2, 4]"]),
    ("wgqa", {"wgqa_weights": "all"}, ["wgqa_weights = 'all'", "scalar", "column", "row"]),
    ("wgqa", {"wgqa_init": "zero"}, ["wgqa_init = 'zero'", "mean", "random"]),
    ("wgqa", {"wgqa_weights": "row"}, ["wgqa_weights = 'row'", "attention_bias = True"]),
    ("wgqa", {"num_key_value_heads": 3}, ["num_key_value_heads = 3", "[1, 2, 4]"]),
    ("sas", {"sas_kernel_size": 2}, ["sas_kernel_size = 2", "odd"]),
    ("sas", {"num_simulated_heads": 5}, ["num_simulated_heads = 5", "num_attention_heads = 2"]),
    ("sas", {"num_simulated_heads": None}, ["num_simulated_heads = None", "required"]),
    ("sas", {"simulated_head_dim": 4}, ["simulated_head_dim = 4", "head_dim = 8"]),
    ("gqa", {"key_rank": 0}, ["key_rank = 0", "shared_diff"]),
    ("unilm_diff_v1", {"lambda_init": [0.2, 0.3]}, ["lambda_init", "layer index"]),
    ("unilm_diff_v1", {"sub_layer_norm": False}, ["sub_layer_norm = False", "'diff_v1'"]),
    ("unilm_diff_v1", {"attention_bias": True}, ["attention_bias = True", "none"]),
    ("unilm_diff_v1", {"num_key_value_heads": 3}, ["num_key_value_heads = 3", "even"]),
    ("unilm_diff_v1", {"hidden_size": 64}, ["head_dim = 8", "hidden_size = 64"]),
]


@pytest.mark.parametrize(("case", "fields", "words"), REFUSED)
def test_wrong_combinations_name_the_fields(case, fields, words):
    with pytest.raises(Exception) as caught:
        config_of(case, **fields)
    for word in words:
        assert word in str(caught.value)


def test_lambda_init_of_one_is_fine_without_the_norm():
    config = config_of("diff_v1-plain", lambda_init=[1.0, 0.0])
    assert config.lambda_init == [1.0, 0.0]


@EVERY_CASE
def test_the_tensor_parallel_plan_names_modules_that_exist(case):
    model = model_of(case)
    modules = {name for name, _ in model.model.named_modules()}
    for pattern in model.config.base_model_tp_plan:
        assert pattern.replace("*", "0") in modules
