"""Tiny random checkpoints of every family, written without torch, and read back as arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from growkit.checkpoint import open_checkpoint
from growkit.core.progress import Silent
from growkit.growing import grow_checkpoint
from growkit.surgery.plan import Plan
from growkit.surgery.request import GrowthRequest

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Config = dict[str, Any]

NUMPY = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAFETENSORS = {dtype: name for name, dtype in NUMPY.items()}
# Large enough that every layer contributes as much as the stream that it writes to.
STD = 0.12
COMMON: Config = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": STD,
    "bos_token_id": None,
    "eos_token_id": None,
}


def gda_config(
    signal: int = 4, noise: int = 2, kv: int = 2, own: bool = True, **changes: Any
) -> Config:
    """Ours; ``kv`` counts key/value pairs."""
    layers = changes.get("num_hidden_layers", COMMON["num_hidden_layers"])
    return (
        COMMON
        | {
            "model_type": "gda",
            "architectures": ["GdaForCausalLM"],
            "num_attention_heads": signal + noise,
            "num_noise_heads": noise,
            "num_key_value_heads": kv * (2 if own else 1),
            "head_dim": 4,
            "noise_keys": "own" if own else "shared",
            "sub_layer_norm": True,
            "attn_rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "lambda_init": [round(0.2 + 0.1 * i, 3) for i in range(layers)],
        }
        | changes
    )


def motif_config(signal: int = 4, noise: int = 4, kv: int = 2, **changes: Any) -> Config:
    """Motif 2.6B's kind (1:1), or with ``num_noise_heads`` Motif-2's."""
    config = COMMON | {
        "model_type": "Motif",
        "architectures": ["MotifForCausalLM"],
        "num_attention_heads": signal + noise,
        "num_key_value_heads": 2 * kv,
        "head_dim": 4,
        "attn_rms_norm_eps": 1e-5,
        "hidden_act": "poly_norm",
        "rope_theta": 10000.0,
    }
    if signal != noise:
        config["num_noise_heads"] = noise
    return config | changes


def diffllama_config(heads: int = 4, kv: int = 4, **changes: Any) -> Config:
    """DIFF V1 as transformers has it; both counts include the noise half."""
    return (
        COMMON
        | {
            "model_type": "diffllama",
            "architectures": ["DiffLlamaForCausalLM"],
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": 4,
            "hidden_act": "silu",
            "lambda_std_dev": 0.1,
        }
        | changes
    )


def llama_config(heads: int = 4, kv: int = 2, **changes: Any) -> Config:
    """Llama with grouped-query attention."""
    return (
        COMMON
        | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": 4,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }
        | changes
    )


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, written out by hand for each family."""
    kind = config["model_type"].lower()
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    width = dim if kind == "llama" or config.get("noise_keys") == "shared" else 2 * dim
    default_noise = 0 if kind == "llama" else heads // 2
    outputs = heads - config.get("num_noise_heads", default_noise)
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        result |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
            attention + "q_proj.weight": (heads * dim, hidden),
            attention + "k_proj.weight": (kv * dim, hidden),
            attention + "v_proj.weight": (kv * dim, hidden),
            attention + "o_proj.weight": (hidden, outputs * width),
            layer + "mlp.gate_proj.weight": (ffn, hidden),
            layer + "mlp.up_proj.weight": (ffn, hidden),
            layer + "mlp.down_proj.weight": (hidden, ffn),
        }
        if kind != "llama":
            result |= {attention + f"lambda_{v}": (dim,) for v in ("q1", "k1", "q2", "k2")}
        if kind == "motif" or (kind == "gda" and config["sub_layer_norm"]):
            result[attention + "subln.weight"] = (width,)
        if config.get("hidden_act") == "poly_norm":
            result |= {layer + "mlp.act_fn.weight": (3,), layer + "mlp.act_fn.bias": (1,)}
        if config.get("attention_bias"):
            result |= {
                attention + "q_proj.bias": (heads * dim,),
                attention + "k_proj.bias": (kv * dim,),
                attention + "v_proj.bias": (kv * dim,),
                attention + "o_proj.bias": (hidden,),
            }
        if config.get("mlp_bias"):
            result |= {
                layer + "mlp.gate_proj.bias": (ffn,),
                layer + "mlp.up_proj.bias": (ffn,),
                layer + "mlp.down_proj.bias": (hidden,),
            }
    result["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = (256, hidden)
    return result


def make_tensors(config: Config, dtype: str = "F32", seed: int = 0) -> Tensors:
    """Random tensors; lambda vectors stay float32, gains lie around one."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, shape in shapes(config).items():
        values = STD * rng.standard_normal(shape)
        if "norm" in name or "subln" in name:
            values += 1.0
        if "lambda" in name:
            values *= 4
        result[name] = values.astype(np.float32 if "lambda" in name else NUMPY[dtype])
    return result


def write_folder(path: Path, config: Config, tensors: Tensors, *, shards: int = 1) -> Path:
    """A checkpoint folder, in one file or in ``shards``."""
    path.mkdir(parents=True)
    dtype = SAFETENSORS[tensors["model.norm.weight"].dtype]
    written = config | {"dtype": TORCH_NAMES[dtype]}
    (path / "config.json").write_text(json.dumps(written, indent=1))
    if shards == 1:
        _write_file(path / "model.safetensors", tensors)
        return path
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        _write_file(path / file, part)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def _write_file(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": SAFETENSORS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_folder(path: Path) -> Tensors:
    """Every tensor of a folder."""
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def read_config(path: Path) -> Config:
    config: Config = json.loads((path / "config.json").read_text())
    return config


def make_folder(
    path: Path, config: Config, dtype: str = "F32", *, seed: int = 0, shards: int = 1
) -> Path:
    """A random checkpoint folder."""
    return write_folder(path, config, make_tensors(config, dtype, seed), shards=shards)


class Told(Silent):
    """A reporter that hands warnings to a function."""

    def __init__(self, told: Callable[[str], None]) -> None:
        self.told = told

    def warn(self, text: str) -> None:
        self.told(text)


def grow(source: Path, out: Path, *, threads: int = 1, **request: Any) -> Plan:
    """Grow without verification. Options that the request does not know go to the writer."""
    options = {k: request.pop(k) for k in ("max_shard_size", "warn", "verify") if k in request}
    options.setdefault("verify", False)
    if "warn" in options:
        options["reporter"] = Told(options.pop("warn"))
    plan, _ = grow_checkpoint(source, out, GrowthRequest(**request), threads=threads, **options)
    return plan


def same_bits(a: Array, b: Array) -> bool:
    """Equal dtype, shape and bytes (so that -0 and NaN count as they are)."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
