"""At 1:1 with own keys GDA is the DIFF Transformer: against its readable form, and DiffLlama."""

from __future__ import annotations

import torch
from gda_cases import HEAD_DIM, HIDDEN, LENGTH, attention_layer, gda_config, scatter_weights
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM
from unilm_reference import diff_attention

from growkit.modeling import GdaForCausalLM

HEADS, KV = 4, 2  # DIFF heads and their key/value heads (each counts a pair)


def test_layer_equals_the_diff_transformer():
    config = gda_config((HEADS, HEADS, KV), attn_rms_norm_eps=1e-5)
    layer = attention_layer(config, layer=1)
    weights = {name: p.detach().double() for name, p in layer.named_parameters()}
    to_interleaved = torch.arange(HEAD_DIM).view(2, -1).T.flatten()  # (i, i + d/2) -> (2i, 2i + 1)
    for name in ("q_proj.weight", "k_proj.weight"):
        rows = weights[name].view(-1, HEAD_DIM, HIDDEN)
        weights[name] = rows[:, to_interleaved].reshape(-1, HIDDEN)
    weights["out_proj.weight"] = weights.pop("o_proj.weight")

    x = torch.randn(LENGTH, HIDDEN, generator=torch.Generator().manual_seed(3))
    angle = torch.arange(LENGTH)[:, None] * 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.cat((angle, angle), dim=-1)[None]
    mask = torch.full((1, 1, LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)
    actual = layer(x[None], (angle.cos(), angle.sin()), mask)[0][0]
    expected = diff_attention(x.double(), weights, 1, 100.0, 1e-5)
    assert (actual - expected).abs().max() < 1e-5
    other_layer = diff_attention(x.double(), weights, 2, 100.0, 1e-5)
    assert (actual - other_layer).abs().max() > 1e-2


def diffllama_weights(weights: dict[str, torch.Tensor], fold_gain: bool) -> dict[str, torch.Tensor]:
    """GDA 1:1 -> DiffLlama: stripes to halves, the norm's gain folded into o_proj."""
    mapped = {}
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = weight.view(-1, 2, HEAD_DIM, HIDDEN)
            weight = pairs.transpose(0, 1).reshape(-1, HIDDEN)
        elif name.endswith("v_proj.weight"):
            weight = weight.view(-1, 2, HEAD_DIM, HIDDEN).transpose(0, 1).reshape(-1, HIDDEN)
        elif name.endswith("o_proj.weight") and fold_gain:
            weight = weight * weights[name.replace("o_proj", "subln")].repeat(HEADS)
        if "subln" not in name:
            mapped[name] = weight
    return mapped


def test_model_equals_diffllama():
    config = gda_config(
        (HEADS, HEADS, KV), attn_rms_norm_eps=1e-5, rms_norm_eps=1e-5, num_hidden_layers=3
    )
    ours = scatter_weights(GdaForCausalLM(config)).eval()
    theirs = DiffLlamaForCausalLM(
        DiffLlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=HIDDEN,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=3,
            num_attention_heads=2 * HEADS,
            num_key_value_heads=2 * KV,
            head_dim=HEAD_DIM,
            rms_norm_eps=1e-5,
            rope_parameters=config.rope_parameters,
            attn_implementation="eager",
        )
    ).eval()
    tokens = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(4))
    expected = ours(tokens).logits

    def difference(**options) -> float:
        theirs.load_state_dict(diffllama_weights(ours.state_dict(), **options))
        return (theirs(tokens).logits - expected).abs().max().item()

    assert difference(fold_gain=True) < 2e-5
    assert difference(fold_gain=False) > 1e-2
