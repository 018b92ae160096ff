"""Write a checkpoint to measure with: python benchmarks/make_checkpoint.py KIND FOLDER

KIND is one of

* ``llama``     1.641 B parameters, bfloat16, 24 layers, 4 shards (3.28 GB)
* ``gda``       1.561 B parameters, bfloat16 with float32 lambda, 22 layers, 4 shards (3.12 GB)
* ``trillion``  1.0 T parameters of Llama's shape: 472 shards whose tensors are holes, so that they
  take no room on disk. Its tensors read as zero; it is for whoever reads headers only.
* ``hundred``   50 B parameters of Llama's shape, 100 GB in 20 shards, holes as well
* ``mha``, ``gqa``, ``tied``  0.25 B parameters, bfloat16, 12 layers of 8 heads with 8 (``gqa``: 4)
  key/value heads, ``tied`` with tied embeddings: for peers that build the target in memory
* ``qwen3``     0.19 B parameters, bfloat16, 8 layers, with the ``layer_types`` that transformers 5
  writes

Weights are slices of one pool of normal numbers (std 0.02) at random places: as hard to compress
as real ones, and quick to make. No torch, no tokenizer.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from growkit.checkpoint import OutputTensor, ShardWriter, plan_shards

Shapes = list[OutputTensor]
POOL_ELEMENTS = 1 << 24
CHUNK_ELEMENTS = 1 << 22


def llama_config(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int
) -> dict[str, Any]:
    """config.json of a Llama, valid for transformers 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        "dtype": "bfloat16",
    }


def gda_config(layers: int = 22) -> dict[str, Any]:
    """config.json of a GDA model: 12 signal and 4 noise heads, own noise keys, sub-layer norm."""
    config = llama_config(layers, 2048, 8192, 16, 8, 32000)
    del config["attention_bias"], config["mlp_bias"]
    return config | {
        "architectures": ["GdaForCausalLM"],
        "model_type": "gda",
        "num_noise_heads": 4,
        "noise_keys": "own",
        "sub_layer_norm": True,
        "attn_rms_norm_eps": 1e-5,
        "lambda_init": [0.8 - 0.6 * 2.718281828459045 ** (-0.3 * i) for i in range(layers)],
        "lambda_std": 0.1,
        "attention_dropout": 0.0,
    }


def qwen3_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of a Qwen3 with the sizes of a Llama's, as transformers 5 writes it."""
    del config["mlp_bias"]
    return config | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "layer_types": ["full_attention"] * config["num_hidden_layers"],
        "max_window_layers": config["num_hidden_layers"],
        "sliding_window": None,
        "use_sliding_window": False,
    }


def tensors_of(config: dict[str, Any]) -> Shapes:
    """Every tensor of the model that a config describes."""
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    gda = config["model_type"] == "gda"
    # In the Motif-2 layout every signal head has a value of width 2 x head_dim.
    read = 2 * (heads - config["num_noise_heads"]) * dim if gda else heads * dim
    matrices = {
        "self_attn.q_proj.weight": (heads * dim, hidden),
        "self_attn.k_proj.weight": (kv_heads * dim, hidden),
        "self_attn.v_proj.weight": (kv_heads * dim, hidden),
        "self_attn.o_proj.weight": (hidden, read),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if gda:
        matrices["self_attn.subln.weight"] = (2 * dim,)
    if config["model_type"] == "qwen3":
        matrices |= {f"self_attn.{role}_norm.weight": (dim,) for role in "qk"}
    tensors = [OutputTensor("model.embed_tokens.weight", "BF16", (config["vocab_size"], hidden))]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors += [OutputTensor(prefix + name, "BF16", shape) for name, shape in matrices.items()]
        if gda:
            tensors += [
                OutputTensor(f"{prefix}self_attn.lambda_{role}", "F32", (dim,))
                for role in ("q1", "k1", "q2", "k2")
            ]
    tensors.append(OutputTensor("model.norm.weight", "BF16", (hidden,)))
    if not config["tie_word_embeddings"]:
        tensors.append(OutputTensor("lm_head.weight", "BF16", (config["vocab_size"], hidden)))
    return tensors


def make_checkpoint(kind: str, folder: Path) -> int:
    """Write one of the checkpoints; returns its bytes of tensors."""
    shard_bytes = 850_000_000
    if kind == "llama":
        config = llama_config(24, 2048, 8192, 16, 8, 32000)
    elif kind == "gda":
        config = gda_config()
    elif kind == "trillion":
        config = llama_config(313, 16384, 53248, 128, 8, 128256)
        shard_bytes = 5_000_000_000
    elif kind == "hundred":
        config = llama_config(66, 8192, 24576, 64, 8, 32000)
        shard_bytes = 5_000_000_000
    elif kind in ("mha", "gqa", "tied"):
        config = llama_config(12, 1024, 4096, 8, 4 if kind == "gqa" else 8, 32000)
        config["tie_word_embeddings"] = kind == "tied"
    elif kind == "qwen3":
        config = qwen3_config(llama_config(8, 1024, 4096, 8, 4, 32000))
    else:
        raise SystemExit(f"unknown kind {kind!r}; {__doc__}")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = tensors_of(config)
    plan = plan_shards(tensors, shard_bytes)
    with ShardWriter(folder, plan) as writer:
        if kind not in ("trillion", "hundred"):
            _fill(writer, tensors)
    print(
        f"{kind}: {plan.total_parameters / 1e9:.4g} B parameters, {plan.total_size / 1e9:.4g} GB "
        f"in {len(plan.shards)} shards, {len(tensors)} tensors"
    )
    return plan.total_size


def _fill(writer: ShardWriter, tensors: Shapes) -> None:
    normal = np.random.default_rng(0).standard_normal(POOL_ELEMENTS, dtype=np.float32)
    pool = (normal * 0.02).astype(ml_dtypes.bfloat16)
    for tensor in tensors:
        if len(tensor.shape) == 1:
            # Norm gains are one; lambda vectors are small, so that exp(lq . lk) is finite.
            kind = np.float32 if tensor.dtype == "F32" else ml_dtypes.bfloat16
            lambdas = normal[: tensor.shape[0]] * 0.1
            vector = lambdas if tensor.dtype == "F32" else np.ones(tensor.shape)
            writer.write(tensor.name, 0, vector.astype(kind))
            continue
        places = np.random.default_rng(zlib.crc32(tensor.name.encode()))
        total = tensor.shape[0] * tensor.shape[1]
        for first in range(0, total, CHUNK_ELEMENTS):
            count = min(CHUNK_ELEMENTS, total - first)
            start = int(places.integers(POOL_ELEMENTS - count + 1))
            writer.write(tensor.name, 2 * first, pool[start : start + count])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    begin = time.perf_counter()
    make_checkpoint(sys.argv[1], Path(sys.argv[2]))
    print(f"{time.perf_counter() - begin:.1f} s")
