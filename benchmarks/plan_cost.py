"""What ``growkit plan`` of very large models costs: python benchmarks/plan_cost.py [OUT.json]

Configs without weights, in a temporary folder. Every growth is a process of its own, three times;
the least CPU seconds stand beside those of the floor of the same run: a plan for a tiny model,
which is start, imports and printing.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
MIXTURE = {"model_type": "qwen3_moe", "num_attention_heads": 64, "num_key_value_heads": 4} | {
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "norm_topk_prob": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "mixture of 1 T": MIXTURE | {"hidden_size": 7168, "num_hidden_layers": 60, "num_experts": 384},
    "mixture of 3 T": MIXTURE | {"hidden_size": 8192, "num_hidden_layers": 94, "num_experts": 640},
    "dense of 1 T": {
        "model_type": "llama",
        "hidden_size": 24576,
        "intermediate_size": 65536,
        "num_hidden_layers": 156,
        "num_attention_heads": 192,
        "num_key_value_heads": 8,
    },
    "8 k heads": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 8192,
        "num_key_value_heads": 8192,
    },
}
GROWTHS = [
    ("tiny", "--layers +2"),
    ("mixture of 1 T", "--layers x2"),
    ("mixture of 1 T", "--query-heads x2"),
    ("mixture of 1 T", "--hidden x16"),
    ("mixture of 1 T", "--experts x8"),
    ("mixture of 3 T", "--ffn x2"),
    ("dense of 1 T", "--layers x2"),
    ("dense of 1 T", "--hidden x16"),
    ("8 k heads", "--hidden x2 --heads x2"),
]


def measured(folder: Path, flags: str) -> dict[str, Any]:
    """CPU seconds, peak memory and tensors of one plan."""
    command = [sys.executable, "-m", "growkit", "plan", str(folder), *flags.split(), "--json"]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} ended with status {status}")
        output.seek(0)
        report = json.load(output)
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_mb": round(usage.ru_maxrss / 1024, 1),
        "tensors": report["tensors"]["total"],
        "parameters_before": report["before"]["parameters"],
        "parameters_after": report["after"]["parameters"],
    }


def main() -> None:
    """Measure all growths and print (or write) them."""
    results = []
    with tempfile.TemporaryDirectory() as work:
        for number, (name, flags) in enumerate(GROWTHS):
            folder = Path(work, str(number))
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(COMMON | MODELS[name]))
            rounds = [measured(folder, flags) for _ in range(3)]
            best = min(rounds, key=lambda figures: figures["cpu_seconds"])
            results.append({"model": name, "growth": flags, **best})
            floor = results[0]["cpu_seconds"]
            results[-1]["times_the_floor"] = round(best["cpu_seconds"] / floor, 2)
    text = json.dumps(results, indent=2) + "\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    main()
