"""GdaConfig: defaults, round trips, sizes in closed form, and refusals that name the fields."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
import torch
from family_counts import kv_elements, parameters
from gda_cases import FORM_IDS, FORMS, HEADS, gda_config

from growkit.families.lambda_schedule import lambda_init_schedule
from growkit.modeling import GdaConfig, GdaForCausalLM

MOTIF_2_12B = {
    "model_type": "Motif",
    "vocab_size": 219520,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_noise_heads": 8,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "hidden_act": "poly_norm",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
MOTIF_2_6B = {
    "model_type": "Motif",
    "vocab_size": 219520,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "poly_norm",
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}


def test_derived_sizes():
    config = gda_config((6, 2, 2), "own")
    assert (config.n_signal, config.n_kv, config.ratio, config.value_dim) == (6, 2, 3, 16)
    config = gda_config((2, 6, 1), "shared")
    assert (config.n_signal, config.n_kv, config.value_dim) == (2, 1, 8)
    assert config.ratio == Fraction(1, 3)


def test_defaults_are_the_diff_transformer():
    config = GdaConfig(num_attention_heads=8, num_hidden_layers=3, head_dim=16)
    assert config.ratio == 1
    assert config.num_key_value_heads == 8
    assert config.lambda_init == lambda_init_schedule(3, "diff")


def test_json_round_trip_keeps_every_field(tmp_path):
    config = gda_config(lambda_init=[0.25, 0.75], rope_theta=5e5, growkit={"lineage": ["a"]})
    config.save_pretrained(tmp_path)
    assert GdaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["lambda_init"] == [0.25, 0.75]
    assert stored["head_dim"] == 8
    assert stored["rope_parameters"]["rope_theta"] == 5e5
    assert stored["growkit"] == {"lineage": ["a"]}


@pytest.mark.parametrize("act", ["silu", "poly_norm"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("noise_keys", "norm"), FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("heads", [HEADS["3:1"], HEADS["1:2"]], ids=["3:1", "1:2"])
def test_closed_forms_count_the_real_model(heads, noise_keys, norm, tied, act):
    config = gda_config(heads, noise_keys, norm, tie_word_embeddings=tied, hidden_act=act)
    model = GdaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == parameters(config)
    outer = config.vocab_size * config.hidden_size * (1 if tied else 2)
    assert parameters(config, "embed") + parameters(config, "lm_head") == outer

    cache = model(torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cached == 5 * 4 * config.num_hidden_layers * kv_elements(config)


def test_motif_sizes_are_the_published_ones():
    large = GdaConfig.from_motif(MOTIF_2_12B)
    assert (large.n_signal, large.n_kv, large.ratio) == (32, 8, 4)
    assert parameters(large) / 1e9 == pytest.approx(12.7035, abs=1e-3)
    assert large.lambda_init[0] == pytest.approx(-0.0099, abs=1e-4)
    small = GdaConfig.from_motif(MOTIF_2_6B)
    assert (small.n_signal, small.head_dim, small.ratio) == (8, 128, 1)
    assert parameters(small) / 1e9 == pytest.approx(2.597, abs=1e-3)
    assert small.rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"k_ratio": 2}, "k_ratio"),
        ({"use_bias": True}, "use_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"head_dim": None}, "head_dim"),
    ],
)
def test_motif_options_without_an_equal_here_are_refused(change, name):
    with pytest.raises(Exception, match=name):
        GdaConfig.from_motif(MOTIF_2_12B | change)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_noise_heads": 3}, ["num_noise_heads = 3", "num_attention_heads", "[1, 2, 4, 6, 7]"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads = 3", "noise_keys", "even"]),
        ({"num_key_value_heads": 8}, ["num_key_value_heads = 8", "num_noise_heads"]),
        ({"noise_keys": "split"}, ["noise_keys = 'split'", "own", "shared"]),
        ({"lambda_init": [0.2]}, ["lambda_init has 1", "num_hidden_layers = 2"]),
        ({"lambda_init": [0.2, math.nan]}, ["lambda_init[1] = nan", "finite"]),
        ({"lambda_init": [0.2, math.inf]}, ["lambda_init[1] = inf", "finite"]),
        ({"lambda_init": [1.0, 0.2]}, ["lambda_init[0] = 1", "sub_layer_norm"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "silu", "poly_norm"]),
        ({"attention_dropout": 0.1}, ["attention_dropout = 0.1", "0.0"]),
        ({"head_dim": None}, ["head_dim = None", "required"]),
        ({"head_dim": 7}, ["head_dim = 7", "even"]),
        ({"num_hidden_layers": -1, "lambda_init": []}, ["num_hidden_layers = -1"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
            | {"partial_rotary_factor": 0.5},
            ["partial_rotary_factor = 0.5"],
        ),
    ],
)
def test_wrong_combinations_name_the_fields(fields, words):
    with pytest.raises(Exception) as caught:
        gda_config(**fields)
    for word in words:
        assert word in str(caught.value)


def test_lambda_init_of_one_is_fine_without_the_norm():
    assert gda_config(sub_layer_norm=False, lambda_init=[1.0, 0.0]).lambda_init == [1.0, 0.0]


def test_tensor_parallel_plan_leaves_polynorm_whole():
    assert "layers.*.mlp.gate_proj" in gda_config().base_model_tp_plan
    assert "layers.*.self_attn.subln" not in gda_config(sub_layer_norm=False).base_model_tp_plan
    plan = gda_config(hidden_act="poly_norm").base_model_tp_plan
    assert "layers.*.mlp.gate_proj" not in plan
    assert plan["layers.*.self_attn.q_proj"] == "colwise"
