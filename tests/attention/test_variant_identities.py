"""What ties a variant to others: folds, limits, and implementations written another way."""

from __future__ import annotations

import pytest
import torch
from gda_cases import HEAD_DIM, HIDDEN, LENGTH, inputs
from torch import nn
from torch.nn import functional
from variant_cases import config_of, layer_of

from growkit.modeling import GrowkitForCausalLM
from growkit.variants.sas.attention import HeadSimulation


def output(layer) -> torch.Tensor:
    return layer(*inputs())[0]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# -- WGQA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["wgqa", "wgqa-column", "wgqa-row"])
def test_wgqa_folds_into_gqa(case):
    layer = layer_of(case)
    fields = {"wgqa_weights": None, "wgqa_init": None, "attention": "gqa"}
    folded = config_of(case, **fields)
    gqa = folded.variant(folded, 1)
    state = {k: v for k, v in layer.state_dict().items() if not k.startswith(("w_", "k_", "v_"))}
    for kind, weights in (("k", layer.w_k), ("v", layer.w_v)):
        weight, bias = layer.merged(getattr(layer, f"{kind}_proj"), weights)
        state[f"{kind}_proj.weight"] = weight
        if bias is not None:
            state[f"{kind}_proj.bias"] = bias
    state["k_norm.weight"] = layer.k_norm.weight
    gqa.load_state_dict(state)
    assert far(output(gqa), output(layer)) < 1e-5


def test_wgqa_starts_as_the_mean_of_its_heads():
    config = config_of("wgqa", qk_norm=False, attention_bias=False)
    torch.manual_seed(0)
    layer = config.variant(config, 0)
    heads = layer.k_proj.weight.unflatten(0, (2, 2, HEAD_DIM))
    weight, _ = layer.merged(layer.k_proj, layer.w_k)
    assert torch.allclose(weight, heads.mean(1).flatten(0, 1), atol=1e-7)


@pytest.mark.parametrize(("start", "std"), [("mean", 0.0), ("random", 1.0)])
def test_wgqa_init(start, std):
    torch.manual_seed(0)
    config = config_of("wgqa-row", wgqa_init=start, hidden_size=256)
    weights = GrowkitForCausalLM(config).model.layers[1].self_attn.w_v
    assert weights.std().item() == pytest.approx(std, abs=0.05)
    assert weights.mean().item() == pytest.approx(0.0 if std else 1 / 3, abs=0.05)


# -- Shared DIFF ----------------------------------------------------------------------------------


def test_shared_diff_without_updates_and_norm_is_scaled_gqa():
    """Both maps are one: (1 - lambda) A V; an update makes them differ."""
    layer = layer_of("shared_diff-q-plain")
    config = config_of("mha", num_attention_heads=2, num_key_value_heads=2)
    plain = config.variant(config, 1)
    names = plain.state_dict()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k in names})
    update = layer.q_up.weight.detach().clone()
    with torch.no_grad():
        layer.q_up.weight.zero_()
        expected = output(plain) * (1 - layer.lambda_full())
        assert far(output(layer), expected) < 1e-5
        layer.q_up.weight.copy_(update)
        assert far(output(layer), expected) > 1e-2


@pytest.mark.parametrize("case", ["shared_diff", "shared_diff-plain"])
def test_merged_updates_are_diff_v1(case):
    """Base plus update, written out, are the adjacent q1, q2 and k1, k2 of DIFF V1."""
    layer = layer_of(case, qk_norm=False, attention_bias=False)
    fields = dict.fromkeys(("query_rank", "key_rank")) | {"attention": "diff_v1"}
    config = config_of(case, qk_norm=False, attention_bias=False, **fields)
    v1 = config.variant(config, 1)
    state = {k: v for k, v in layer.state_dict().items() if "_down" not in k and "_up" not in k}
    for kind, rank in (("q", layer.config.query_rank), ("k", layer.config.key_rank)):
        base = getattr(layer, f"{kind}_proj").weight.unflatten(0, (-1, 1, HEAD_DIM))
        down = getattr(layer, f"{kind}_down").weight.unflatten(0, (-1, 2, rank))
        up = getattr(layer, f"{kind}_up").weight.unflatten(0, (-1, 2, HEAD_DIM))
        state[f"{kind}_proj.weight"] = (base + up @ down).flatten(0, 2)
    v1.load_state_dict(state)
    assert far(output(v1), output(layer)) < 1e-5


# -- DIFF V2 --------------------------------------------------------------------------------------


def test_diff_v2_on_duplicated_heads_is_half_of_gqa():
    """Each query head beside itself and lambda_proj zero: (1 - sigmoid(0)) A V."""
    config = config_of("mha", num_key_value_heads=2)
    plain, v2 = config.variant(config, 1), layer_of("diff_v2")
    state = plain.state_dict()
    heads = state["q_proj.weight"].unflatten(0, (-1, HEAD_DIM))
    state["q_proj.weight"] = heads.repeat_interleave(2, 0).flatten(0, 1)
    state["lambda_proj.weight"] = torch.zeros(4, HIDDEN)
    v2.load_state_dict(state)
    assert far(2 * output(v2), output(plain)) < 1e-5
    state["q_proj.weight"] = heads.repeat(2, 1, 1).flatten(0, 1)  # tiled: the wrong pairs
    v2.load_state_dict(state)
    assert far(2 * output(v2), output(plain)) > 1e-2


# -- SAS ------------------------------------------------------------------------------------------


def test_peaa_averages_before_the_projection():
    layer = layer_of("sas-linear", num_simulated_heads=12)
    attended = torch.randn(2, LENGTH, 12, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    hidden, _, _ = inputs()
    chunks = [layer.o_proj(part.flatten(2)) for part in attended.split(4, dim=2)]
    averaged = torch.stack(chunks).mean(0)
    assert far(layer.combine(attended, hidden), averaged) < 1e-5
    strided = [layer.o_proj(attended[:, :, j::3].flatten(2)) for j in range(3)]
    assert far(torch.stack(strided).mean(0), averaged) > 1e-2, "the chunks are consecutive"


def test_simulation_is_that_of_the_released_module():
    """The steps of SAS.py with modules of torch, head axis as channels."""
    simulation = layer_of("sas").simulate_q
    heads, residual = simulation.heads, simulation.heads_residual
    states = torch.randn(2, 2, LENGTH, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    z = states.permute(0, 2, 1, 3).reshape(2 * LENGTH, 2, HEAD_DIM)
    z = functional.conv1d(z, heads.weight, heads.bias, padding=1)
    z = functional.conv1d(z.relu(), residual.weight, residual.bias, padding=1) + z
    z = simulation.features(z)
    z = simulation.features_residual(z.relu()) + z
    assert far(simulation(states), z.reshape(2, LENGTH, 6, 12).transpose(1, 2)) < 1e-6


def identity_simulation(simulation: HeadSimulation, simulated: int, width: int) -> None:
    """Centre tap: simulated head j is head j mod H; features unchanged, the further ones zero."""
    with torch.no_grad():
        for parameter in simulation.parameters():
            parameter.zero_()
        heads, kernel = simulation.heads.weight.shape[1:]
        for j in range(simulated):
            simulation.heads.weight[j, j % heads, kernel // 2] = 1
        if simulation.features is not None:
            nn.init.eye_(simulation.features.weight[:HEAD_DIM])
            simulation.features.weight.mul_((width / HEAD_DIM) ** 0.25)  # q k: sqrt(D' / d)


def test_sas_with_identity_simulation_is_mha_with_its_rotary_encoding():
    """Holds only if features 0 ... d - 1 keep the pairs and frequencies of d."""
    sas = layer_of("sas", num_attention_heads=4, num_key_value_heads=4, num_simulated_heads=8)
    config = config_of("mha")
    plain = config.variant(config, 1)
    for simulation in (sas.simulate_q, sas.simulate_k, sas.simulate_v):
        identity_simulation(simulation, 8, 12)
    names = plain.state_dict()
    plain.load_state_dict({k: v for k, v in sas.state_dict().items() if k in names})
    assert far(output(sas), output(plain)) < 1e-5
    with torch.no_grad():
        sas.simulate_k.features.weight.copy_(sas.simulate_k.features.weight.roll(1, 0))
    assert far(output(sas), output(plain)) > 1e-2
