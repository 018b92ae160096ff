"""What a first use costs: a table derived for real sizes, and the commands that read shipped ones.

    python benchmarks/coverage/first_use.py

prints wall time, CPU time and the largest resident memory of ``growkit derive`` for a config of
8 B parameters and for one of 10^12 (Kimi-K2's sizes), and of ``growkit inspect`` and ``growkit
plan`` for a model type whose table ships. Each command is a process of its own; nothing of a model
is needed but its config.json (for ``plan`` and ``inspect``: a small folder with weights).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from growkit.families.derived.family import derived_family

APERTUS_8B: dict[str, Any] = {
    "model_type": "apertus",
    "architectures": ["ApertusForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 21504,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 131072,
    "tie_word_embeddings": False,
}
KIMI_K2: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
SMALL: dict[str, Any] = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 12,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
}


def folder_of(config: dict[str, Any], path: Path, *, weights: bool = False) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    family = derived_family(config) if weights else None
    if family is not None:
        shapes = family.declared(family.sizes_of(config))
        tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes}
        save_file(tensors, path / "model.safetensors")
    return path


def measured(*words: str, environment: dict[str, str]) -> str:
    """Wall, CPU and memory of one command, each run in a process that has no other child."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "growkit", *words], capture_output=True, env=environment, text=True
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    told = "" if done.returncode == 0 else f", exit {done.returncode}: {done.stderr[-200:]}"
    return f"{wall:.2f} s, {cpu:.2f} s of CPU, {after.ru_maxrss // 1024} MB{told}"


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="growkit-first-use-") as name:
        work = Path(name)
        environment = {**os.environ, "XDG_CACHE_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}
        small = folder_of(SMALL, work / "small", weights=True)
        # The small ones first: the memory told is that of the largest child so far.
        for words in (("inspect",), ("plan", "--layers", "x2", "--ffn", "x2")):
            command = [words[0], str(small), *words[1:]]
            print(f"{words[0]} gpt_oss: {measured(*command, environment=environment)}", flush=True)
        for title, config in (("8 B", APERTUS_8B), ("10^12 parameters", KIMI_K2)):
            folder = folder_of(config, work / config["model_type"])
            line = measured("derive", str(folder), "--quiet", environment=environment)
            print(f"derive {config['model_type']}, {title}: {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
