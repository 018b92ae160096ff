"""What ``growkit plan`` and ``inspect`` of very large models cost: python plan_cost.py [OUT.json]

Plans are of configs without weights, in a temporary folder; ``inspect`` is of 100,059 tensors in
1,962 files that are all hole, beside reading their headers with Python's json alone. Every growth
is a process of its own, three times; the least CPU seconds stand beside those of the floor of the
same run: a plan for a tiny model, which is start, imports and printing.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
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


def write_many_files(folder: Path) -> None:
    """A mixture of 88 layers of 376 experts, 51 tensors a file."""
    hidden, layers, experts = 8192, 88, 376
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_experts": experts}
    (folder / "config.json").write_text(json.dumps(COMMON | MIXTURE | sizes))
    shapes = {"model.embed_tokens.weight": [151936, hidden], "lm_head.weight": [151936, hidden]}
    shapes["model.norm.weight"] = [hidden]
    attention = {"q_proj": [8192, hidden], "o_proj": [hidden, 8192], "q_norm": [128]}
    attention |= {"k_proj": [512, hidden], "v_proj": [512, hidden], "k_norm": [128]}
    expert = {"gate_proj": [2048, hidden], "up_proj": [2048, hidden], "down_proj": [hidden, 2048]}
    for layer in (f"model.layers.{index}" for index in range(layers)):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = [hidden]
        shapes |= {f"{layer}.self_attn.{n}.weight": shape for n, shape in attention.items()}
        shapes[f"{layer}.mlp.gate.weight"] = [experts, hidden]
        for index in range(experts):
            for name, shape in expert.items():
                shapes[f"{layer}.mlp.experts.{index}.{name}.weight"] = shape
    names, weight_map, total = list(shapes), {}, 0
    count = -(-len(names) // 51)
    for number in range(count):
        file, header, end = f"model-{number + 1:05d}-of-{count:05d}.safetensors", {}, 0
        for name in names[51 * number : 51 * (number + 1)]:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header, separators=(",", ":")).encode()
        with open(folder / file, "wb") as shard:
            shard.write(len(text).to_bytes(8, "little") + text)
            shard.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


READ_HEADERS = """
import json, pathlib, sys
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    with open(file, "rb") as shard:
        json.loads(shard.read(int.from_bytes(shard.read(8), "little")))
json.loads(pathlib.Path(sys.argv[1], "model.safetensors.index.json").read_text())
"""


def inspected(folder: Path) -> dict[str, Any]:
    """Seconds of ``inspect``, of the start of growkit, and of the headers alone; least of three."""
    commands = {
        "inspect": ["-m", "growkit", "inspect", str(folder)],
        "start": ["-m", "growkit", "--help"],
        "headers": ["-c", READ_HEADERS, str(folder)],
    }
    found: dict[str, Any] = {"model": "100,059 tensors in 1,962 files"}
    for name, command in commands.items():
        wall, cpu = [], []
        for _ in range(3):
            begun = time.perf_counter()
            process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0, command
            wall.append(time.perf_counter() - begun)
            cpu.append(usage.ru_utime + usage.ru_stime)
        found |= {f"{name}_seconds": round(min(wall), 2), f"{name}_cpu_seconds": round(min(cpu), 2)}
    return found


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
        many = Path(work, "many")
        many.mkdir()
        write_many_files(many)
        results.append(inspected(many))
    text = json.dumps(results, indent=2) + "\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    main()
