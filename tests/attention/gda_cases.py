"""Small GDA configs and attention layers with weights large enough that every part matters."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from growkit.modeling import GdaConfig
from growkit.modeling.modeling_gda import ATTENTION_CLASSES

HEAD_DIM, HIDDEN, LENGTH = 8, 32, 7

# signal heads, noise heads, key/value groups
HEADS = {
    "1:1": (2, 2, 2),
    "1:1-gqa": (4, 4, 2),
    "2:1-mqa": (4, 2, 1),
    "3:1": (6, 2, 2),
    "4:1": (4, 1, 1),
    "1:2": (2, 4, 2),
    "1:3-mqa": (2, 6, 1),
}
FORMS = list(itertools.product(["own", "shared"], [True, False]))
FORM_IDS = [f"{keys}-{'norm' if norm else 'plain'}" for keys, norm in FORMS]


def gda_config(
    heads: tuple[int, int, int] = (6, 2, 2),
    noise_keys: str = "own",
    sub_layer_norm: bool = True,
    implementation: str = "eager",
    **fields,
) -> GdaConfig:
    signal, noise, kv = heads
    return GdaConfig(
        **{
            "vocab_size": 61,
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": signal + noise,
            "num_noise_heads": noise,
            "num_key_value_heads": kv * (2 if noise_keys == "own" else 1),
            "head_dim": HEAD_DIM,
            "noise_keys": noise_keys,
            "sub_layer_norm": sub_layer_norm,
            "pad_token_id": 0,
            "attn_implementation": implementation,
            **fields,
        }
    )


def scatter_weights(module: nn.Module, seed: int = 1) -> nn.Module:
    """Weights that keep activations near 1, with norm gains and lambdas away from neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2 and "embed" not in name:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif "norm" in name or "subln" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return module


def attention_layer(config: GdaConfig, layer: int = 1) -> nn.Module:
    return scatter_weights(ATTENTION_CLASSES[config.noise_keys](config, layer))


def inputs(seed: int = 0, batch: int = 2) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Hidden states, cos and sin, and an additive causal mask that also hides left padding."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, LENGTH, HIDDEN, generator=generator)
    frequencies = 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(LENGTH)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[None]
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().repeat(batch, 1, 1, 1)
    allowed[-1, :, :, :2] = False  # the last sequence begins with two padding tokens
    allowed |= torch.eye(LENGTH, dtype=torch.bool)  # a padded row still needs one visible key
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return hidden, (angles.cos(), angles.sin()), mask
