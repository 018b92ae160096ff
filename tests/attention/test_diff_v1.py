"""At 1:1 with own keys GDA is the DIFF Transformer: against a version of its own, and DiffLlama."""

from __future__ import annotations

import math

import torch
from gda_cases import HEAD_DIM, HIDDEN, LENGTH, attention_layer, gda_config, scatter_weights
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

from growkit.modeling import GdaForCausalLM

HEADS, KV = 4, 2  # DIFF heads and their key/value heads (each counts a pair)


def interleaved_rope(x: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (0, 1), (2, 3) ... of [n, heads, 2, d] by position."""
    n, d = x.shape[0], x.shape[-1]
    angle = torch.arange(n)[:, None] * 100.0 ** (-torch.arange(0, d, 2) / d)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    return torch.view_as_real(turned).flatten(-2)


def diff_transformer(x, weights, layer: int, eps: float) -> torch.Tensor:
    """arXiv 2410.05258 section 2.1 in the layout of Microsoft's reference: one sequence [n, E]."""
    n = x.shape[0]
    q = interleaved_rope((x @ weights["q_proj.weight"].T).view(n, HEADS, 2, HEAD_DIM))
    k = interleaved_rope((x @ weights["k_proj.weight"].T).view(n, KV, 2, HEAD_DIM))
    v = (x @ weights["v_proj.weight"].T).view(n, KV, 2 * HEAD_DIM)
    k, v = k.repeat_interleave(HEADS // KV, 1), v.repeat_interleave(HEADS // KV, 1)
    scores = torch.einsum("nhcd,mhcd->hcnm", q, k) / math.sqrt(HEAD_DIM)
    maps = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)
    init = 0.8 - 0.6 * math.exp(-0.3 * layer)
    lam = (weights["lambda_q1"] @ weights["lambda_k1"]).exp()
    lam = lam - (weights["lambda_q2"] @ weights["lambda_k2"]).exp() + init
    heads = torch.einsum("hnm,mhd->nhd", maps[:, 0] - lam * maps[:, 1], v)
    heads = heads / (heads.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    heads = heads * weights["subln.weight"] * (1 - init)
    return heads.flatten(1) @ weights["o_proj.weight"].T


def test_layer_equals_the_diff_transformer():
    config = gda_config((HEADS, HEADS, KV), attn_rms_norm_eps=1e-5)
    layer = attention_layer(config, layer=1)
    weights = {name: p.detach().double() for name, p in layer.named_parameters()}
    to_interleaved = torch.arange(HEAD_DIM).view(2, -1).T.flatten()  # (i, i + d/2) -> (2i, 2i + 1)
    for name in ("q_proj.weight", "k_proj.weight"):
        rows = weights[name].view(-1, HEAD_DIM, HIDDEN)
        weights[name] = rows[:, to_interleaved].reshape(-1, HIDDEN)

    x = torch.randn(LENGTH, HIDDEN, generator=torch.Generator().manual_seed(3))
    angle = torch.arange(LENGTH)[:, None] * 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.cat((angle, angle), dim=-1)[None]
    mask = torch.full((1, 1, LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)
    actual = layer(x[None], (angle.cos(), angle.sin()), mask)[0][0]
    expected = diff_transformer(x.double(), weights, 1, 1e-5)
    assert (actual - expected).abs().max() < 1e-5
    other_layer = diff_transformer(x.double(), weights, 2, 1e-5)
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
