"""Tiny random checkpoints, and growth by hand: the references that verification must judge."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

VOCAB = 256


def config(**changes: Any) -> MistralConfig:
    """Mistral is Llama without the rule that heads divide the hidden size."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "sliding_window": None,
        # Large enough that every layer contributes as much as the stream that it writes to.
        "initializer_range": 0.12,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return MistralConfig(**(values | changes))


def make_model(seed: int = 0, **changes: Any) -> MistralForCausalLM:
    torch.manual_seed(seed)
    return MistralForCausalLM(config(**changes)).eval()


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    return folder


def edit(folder: Path, change: Any) -> None:
    """Apply ``change(tensors)`` to the stored tensors of a single-file folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_plan(folder: Path, **plan: Any) -> None:
    (folder / "growkit.json").write_text(json.dumps({"plan": plan}))


def grow_depth(model: MistralForCausalLM, after: list[int]) -> tuple[MistralForCausalLM, list[Any]]:
    """Insert identity layers (copies with zeroed residual writers) after the given layers."""
    depth = model.config.num_hidden_layers
    order: list[tuple[int, str]] = []
    for layer in range(depth):
        order.append((layer, "copy"))
        order += [(layer, "identity")] * after.count(layer)
    grown = make_model(**_sizes(model, num_hidden_layers=len(order)))
    state = dict(model.state_dict())
    for new, (source, kind) in enumerate(order):
        grown.model.layers[new].load_state_dict(model.model.layers[source].state_dict())
        if kind == "identity":
            grown.model.layers[new].self_attn.o_proj.weight.data.zero_()
            grown.model.layers[new].mlp.down_proj.weight.data.zero_()
    outer = {name: value for name, value in state.items() if ".layers." not in name}
    grown.load_state_dict(outer, strict=False)
    return grown, [{"source": source, "kind": kind} for source, kind in order]


def grow_heads(
    model: MistralForCausalLM, *, first_share: float = 0.25, wrong: bool = False
) -> MistralForCausalLM:
    """Every query head twice, its o_proj columns shared out ``first_share`` to the rest.

    Grouped-query attention gives query head h the key head ``h * kv // heads``, so copies must
    stand next to their source (repeat_interleave). ``wrong`` tiles instead: the negative control.
    """
    heads, size = model.config.num_attention_heads, model.config.head_dim
    grown = make_model(**_sizes(model, num_attention_heads=2 * heads))
    state = dict(model.state_dict())
    one = torch.arange(heads)
    sources = one.repeat(2) if wrong else one.repeat_interleave(2)
    shares = torch.tensor([first_share, 1 - first_share])
    shares = shares.repeat_interleave(heads) if wrong else shares.repeat(heads)
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        q = state[prefix + "q_proj.weight"].view(heads, size, -1)
        o = state[prefix + "o_proj.weight"].view(-1, heads, size)
        state[prefix + "q_proj.weight"] = q[sources].reshape(2 * heads * size, -1)
        state[prefix + "o_proj.weight"] = (o[:, sources] * shares[None, :, None]).flatten(1)
    grown.load_state_dict(state)
    return grown


def grow_ffn(model: MistralForCausalLM, *, first_share: float = 0.25) -> MistralForCausalLM:
    """Every feed-forward neuron twice; down_proj columns shared out."""
    width = model.config.intermediate_size
    grown = make_model(**_sizes(model, intermediate_size=2 * width))
    state = dict(model.state_dict())
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp."
        for name in ("gate_proj", "up_proj"):
            state[f"{prefix}{name}.weight"] = state[f"{prefix}{name}.weight"].repeat(2, 1)
        down = state[prefix + "down_proj.weight"]
        parts = [down * first_share, down * (1 - first_share)]
        state[prefix + "down_proj.weight"] = torch.cat(parts, dim=1)
    grown.load_state_dict(state)
    return grown


def grow_hidden(model: MistralForCausalLM) -> MistralForCausalLM:
    """The residual stream twice, [x, x]: readers halve their columns, writers repeat their rows."""
    grown = make_model(**_sizes(model, hidden_size=2 * model.config.hidden_size))
    state = dict(model.state_dict())
    for name, value in state.items():
        if "norm" in name:
            state[name] = value.repeat(2)
        elif "o_proj" in name or "down_proj" in name:
            state[name] = value.repeat(2, 1)
        elif "embed_tokens" in name:
            state[name] = value.repeat(1, 2)
        else:
            state[name] = value.repeat(1, 2) / 2
    grown.load_state_dict(state)
    return grown


def rounded(model: MistralForCausalLM) -> MistralForCausalLM:
    """The same model with weights that bfloat16 holds exactly."""
    return copy.deepcopy(model).to(torch.bfloat16).float()


def _sizes(model: MistralForCausalLM, **changes: Any) -> dict[str, Any]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "initializer_range",
    )
    return {name: getattr(model.config, name) for name in names} | changes
