# SPDX-License-Identifier: Apache-2.0
"""Whole folders that are damaged: checkpoints of several families, a grown one, a run, a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny_checkpoints as tiny
import yaml
from safetensors.numpy import save_file

from growkit.families import family_of
from growkit.training.read_recipe import make_recipe

COMMON = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64, "initializer_range": 0.02, "tie_word_embeddings": False,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": COMMON | {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 8, "decoder_sparse_step": 1, "mlp_only_layers": [0],
    },
    "mixtral": COMMON | {
        "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
    "gemma3": COMMON | {
        "model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8, "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
        "query_pre_attn_scalar": 4,
    },
    "phi3": COMMON | {"model_type": "phi3", "rope_scaling": None, "rope_parameters": ROPE},
    "qwen2": COMMON | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2,
        "n_head": 4, "layer_norm_epsilon": 1e-5,
    },
    "gpt_neox": COMMON | {
        "model_type": "gpt_neox", "rotary_pct": 0.5, "layer_norm_eps": 1e-5,
        "num_key_value_heads": None, "head_dim": None, "use_parallel_residual": True,
    },
    "t5": {
        "model_type": "t5", "vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 12,
        "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4,
        "relative_attention_num_buckets": 8, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def declared(path: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A checkpoint with random tensors of the names and shapes that its family declares."""
    config = {key: value for key, value in config.items() if value is not None}
    family, rng = family_of(config), np.random.default_rng(seed)
    sizes = family.sizes(config)
    tensors = {
        name: rng.normal(size=tensor.shape(sizes)).astype(np.float32)
        for tensor, _, name in family.names(sizes)
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    names, index = sorted(tensors), {}
    for shard in range(2):
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[shard::2]}
        save_file(part, path / file)
        index |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def side_files(folder: Path) -> Path:
    """What lies beside the weights of a published model."""
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en]\nbase_model: a/b\n---\n\n# A model\n"
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "do_sample": true}')
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tok.X", null]}}'
    )
    (folder / "tok.py").write_text("from .other import Y\n")
    return folder


def optimizer_state(folder: Path) -> Path:
    """growkit_optimizer/ of a checkpoint."""
    place = folder / "growkit_optimizer"
    tensors = tiny.read_folder(folder)
    place.mkdir()
    for kind in ("exp_avg", "exp_avg_sq"):
        save_file(tensors, place / f"{kind}.safetensors")
    index = {
        "format": 1, "mode": "grow", "exact": True, "moments": ["exp_avg", "exp_avg_sq"],
        "source": {"layout": "trainer", "file": "optimizer.pt", "step": 5.0,
                   "groups": [{"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.1}]},
        "parameters": {n: {"step": 5.0, "moments": ["exp_avg", "exp_avg_sq"]} for n in tensors},
        "roles": {"q": {"action": "grown", "moments": "exact"},
                  "k": [{"action": "fresh", "moments": "none", "why": "x"}]},
    }  # fmt: skip
    (place / "state.json").write_text(json.dumps(index))
    return folder


def recipe_of(text: Path) -> dict[str, Any]:
    return {
        "model": {"config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
                             "num_hidden_layers": 2, "num_attention_heads": 2}},
        "tokenizer": {"bytes": True},
        "data": {"files": [str(text)], "sequence_length": 16, "max_eval_tokens": 160},
        "training": {"max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 2},
    }  # fmt: skip


def run_folder(folder: Path, text: Path) -> Path:
    """An output folder of a training that has ended."""
    tiny.make_folder(folder, tiny.llama_config())
    place = folder / "training"
    place.mkdir()
    recipe = make_recipe(recipe_of(text))
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    (place / "data.json").write_text('{"packed": "abc"}')
    rows = [
        {"step": s, "tokens": 64 * s, "loss": 5.0 - s / 10, "grad_norm": 1.0, "learning_rate": 1e-3,
         "seconds": 0.1 * s}
        for s in range(2, 13, 2)
    ]  # fmt: skip
    rows += [{"step": s, "tokens": 64 * s, "eval_loss": 5.0, "perplexity": 148.0} for s in (6, 12)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {"steps": 12, "tokens": 768, "trained_tokens": 768, "parameters": 1000,
              "eval_loss": 5.0, "held_out_tokens": 160, "recipe": recipe.to_dict()}  # fmt: skip
    (folder / "growkit_training.json").write_text(json.dumps(record))
    for step in (6, 12):
        checkpoint = tiny.make_folder(place / "checkpoints" / f"checkpoint-{step}",
                                      tiny.llama_config())  # fmt: skip
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (checkpoint / name).write_bytes(b"state of " + name.encode())
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        files = {p.name: p.stat().st_size for p in checkpoint.iterdir()}
        manifest = {"format": 1, "step": step, "processes": 1, "strategy": "ddp", "files": files}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return folder


def make_all(place: Path) -> dict[str, Path]:
    """Every template, by name."""
    text = place / "text.txt"
    place.mkdir(parents=True, exist_ok=True)
    text.write_text("some words of a text\n" * 50)
    made = {name: declared(place / name, config) for name, config in CONFIGS.items()}
    made |= {
        "gda": side_files(tiny.make_folder(place / "gda", tiny.gda_config())),
        "motif": tiny.make_folder(place / "motif", tiny.motif_config()),
        "diffllama": tiny.make_folder(place / "diffllama", tiny.diffllama_config()),
        "llama": side_files(tiny.make_folder(place / "llama", tiny.llama_config())),
        "state": optimizer_state(tiny.make_folder(place / "state", tiny.llama_config())),
        "run": run_folder(place / "run", text),
    }
    tiny.grow(made["llama"], place / "grown", layers="+1")
    made["grown"] = place / "grown"
    recipes = place / "recipes"
    recipes.mkdir()
    (recipes / "grow.yaml").write_text("grow: {layers: +1, heads: x2, seed: 3}\n")
    (recipes / "train.yaml").write_text(yaml.safe_dump(recipe_of(text)))
    made["recipes"] = recipes
    return made
