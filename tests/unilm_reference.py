"""Microsoft's reference of DIFF V1 in readable form, and a small model around it, in float64.

Written from arXiv 2410.05258, section 2.1, and the layout of ``multihead_flashdiff_1.py``; it knows
nothing of growkit. The release has one module: attention. The body around it is Llama's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import tiny_checkpoints as tiny
import torch
from torch import Tensor

Weights = dict[str, Tensor]
Config = dict[str, Any]


def interleaved_rope(x: Tensor, theta: float) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3) ... of [n, heads, 2, d] by position."""
    n, d = x.shape[0], x.shape[-1]
    angle = torch.arange(n)[:, None] * theta ** (-torch.arange(0, d, 2).double() / d)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    return torch.view_as_real(turned).flatten(-2)


def diff_attention(x: Tensor, weights: Weights, layer: int, theta: float, eps: float) -> Tensor:
    """One sequence [n, E] through the attention of one layer; names of the reference."""
    n, d = x.shape[0], len(weights["lambda_q1"])
    q = interleaved_rope((x @ weights["q_proj.weight"].T).view(n, -1, 2, d), theta)
    k = interleaved_rope((x @ weights["k_proj.weight"].T).view(n, -1, 2, d), theta)
    v = (x @ weights["v_proj.weight"].T).view(n, -1, 2 * d)
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("nhcd,mhcd->hcnm", q, k) / math.sqrt(d)
    maps = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)
    init = 0.8 - 0.6 * math.exp(-0.3 * layer)
    lam = (weights["lambda_q1"] @ weights["lambda_k1"]).exp()
    lam = lam - (weights["lambda_q2"] @ weights["lambda_k2"]).exp() + init
    heads = torch.einsum("hnm,mhd->nhd", maps[:, 0] - lam * maps[:, 1], v)
    heads = rms_norm(heads, weights["subln.weight"], eps) * (1 - init)
    return heads.flatten(1) @ weights["out_proj.weight"].T


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def model_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits [n, vocab] of one sequence [n], from the tensors of a folder."""
    config = tiny.read_config(folder)
    tensors = tiny.read_folder(folder)
    weights = {k: torch.from_numpy(v.astype(np.float64)) for k, v in tensors.items()}
    eps, theta = config["rms_norm_eps"], config.get("rope_theta", 10000.0)
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        block = {k.removeprefix(at): v for k, v in weights.items() if k.startswith(at)}
        names = {k.removeprefix("self_attn."): v for k, v in block.items()}
        normed = rms_norm(x, block["input_layernorm.weight"], eps)
        x = x + diff_attention(normed, names, layer, theta, 1e-5)
        normed = rms_norm(x, block["post_attention_layernorm.weight"], eps)
        gate = normed @ block["mlp.gate_proj.weight"].T
        up = normed @ block["mlp.up_proj.weight"].T
        x = x + (torch.nn.functional.silu(gate) * up) @ block["mlp.down_proj.weight"].T
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def write_folder(path: Path, dtype: str = "F32", **changes: Any) -> Path:
    """A folder as a user of the reference writes it: 4 heads (8 maps) on 2, of 8 channels."""
    sizes = {"hidden_size": 64, "intermediate_size": 24, "head_dim": 8, "rope_theta": 100.0}
    like = tiny.diffllama_config(8, 4, **sizes)
    tensors = {}
    for name, tensor in tiny.make_tensors(like, dtype).items():
        tensors[name.replace("o_proj", "out_proj")] = tensor
    for layer in range(like["num_hidden_layers"]):
        noise = 0.3 * np.random.default_rng(layer).standard_normal(16)
        name = f"model.layers.{layer}.self_attn.subln.weight"
        tensors[name] = (1 + noise).astype(tiny.NUMPY[dtype])
    config = {k: v for k, v in like.items() if k not in ("head_dim", "lambda_std_dev")}
    own = {"model_type": "growkit", "attention": "unilm_diff_v1", "architectures": None}
    return tiny.write_folder(path, config | own | changes, tensors)
