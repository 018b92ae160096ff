"""Tokens a second, MFU and memory of training: grouped differential attention against plain Llama.

    python benchmarks/training_throughput.py                      # one GPU, 100 M to 1 B parameters
    python benchmarks/training_throughput.py --smoke              # tiny, on the CPU, in seconds

Both models of a pair have the same hidden size, layers, FFN, query heads, key/value heads and head
dimension; the differential one has a quarter of its query heads as noise heads. Every run is
`growkit train` from scratch on the built-in text (the tokens do not matter), in a process of its
own; the first log lines (warm-up, compilation) are left out and the median of the rest is taken.

MFU is (6 N + 12 L H d T) tokens/s / peak, with N parameters without the input embedding, L layers,
H query heads of dimension d and sequences of T tokens (PaLM, arXiv:2204.02311, appendix B): the
differential model's second set of maps is counted as the heads that it takes.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPES = {
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "heads": 12},
    "350M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "heads": 16},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "heads": 32},
}
SMOKE = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "heads": 4},
}
# Dense bfloat16 FLOP/s, from the makers' data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def model_config(kind: str, shape: dict[str, int], length: int, vocabulary: int) -> dict[str, Any]:
    """A config section of a recipe; both kinds have the same heads."""
    heads = shape["heads"]
    config: dict[str, Any] = {key: value for key, value in shape.items() if key != "heads"}
    config |= {
        "model_type": kind,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": shape["hidden_size"] // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "tie_word_embeddings": True,
    }
    if kind == "gda":
        config |= {"num_noise_heads": heads // 4, "noise_keys": "own", "sub_layer_norm": True}
    return config


def recipe_values(case: dict[str, Any]) -> dict[str, Any]:
    """The recipe of one run."""
    model: dict[str, Any] = {
        "config": model_config(case["kind"], case["shape"], case["length"], case["vocabulary"])
    }
    if case["attention"]:
        model["attn_implementation"] = case["attention"]
    return {
        "model": model,
        "tokenizer": {"bytes": True},
        "data": {"files": "sample", "sequence_length": case["length"], "eval_fraction": 0},
        "training": {
            "max_steps": case["steps"],
            "schedule": "constant",
            "per_device_train_batch_size": case["batch"],
            "bf16": case["bf16"],
            "torch_compile": case["compile"],
            "gradient_checkpointing": case["checkpointing"],
            "use_cpu": case["cpu"],
            "logging_steps": case["every"],
            "save_steps": case["steps"],
        },
    }


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case in this process."""
    import torch

    from growkit.training import train
    from growkit.training.metrics import read_metrics
    from growkit.training.read_recipe import make_recipe

    with tempfile.TemporaryDirectory() as folder:
        result = train(make_recipe(recipe_values(case)), Path(folder) / "run")
        rows = [row for row in read_metrics(result.metrics) if "tokens_per_second" in row]
    kept = [row["tokens_per_second"] for row in rows[case["skip"] :]]
    speed = statistics.median(kept)
    on_gpu = torch.cuda.is_available() and not case["cpu"]
    shape = case["shape"]
    matrices = result.parameters  # tied: the head's matrix is the embedding's, and does compute
    attention = 12 * shape["num_hidden_layers"] * shape["hidden_size"] * case["length"]
    flops = 6 * matrices + attention
    peak = case["peak"] or next(
        (value for key, value in PEAKS.items() if on_gpu and key in torch.cuda.get_device_name()),
        None,
    )
    return {
        "parameters": result.parameters,
        "tokens_per_second": round(speed, 1),
        "flops_per_token": flops,
        "mfu": round(flops * speed / peak, 4) if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
        "torch": torch.__version__,
    }


def in_own_process(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case where nothing of another one is in memory."""
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(case)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; the last column compares a differential model with the Llama before it."""
    lines = [
        "| shape | model | parameters | tokens/s | MFU | peak GB | of Llama's speed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = next(r for r in rows if r["name"] == row["name"] and r["kind"] == "llama")
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"| {row['name']} | {row['kind']} | {row['parameters'] / 1e6:,.1f} M "
            f"| {row['tokens_per_second']:,.0f} | {mfu} | {row['peak_bytes'] / 1e9:.2f} "
            f"| {row['tokens_per_second'] / base['tokens_per_second']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--attention", help="attn_implementation, e.g. flash_attention_2")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--peak-flops", type=float, help="of the device, for MFU")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))))
        return
    shapes = SMOKE if options.smoke else {name: SHAPES[name] for name in options.shapes}
    rows = []
    for name, shape in shapes.items():
        for kind in ("llama", "gda"):
            case = {
                "kind": kind,
                "shape": shape,
                "length": 32 if options.smoke else options.length,
                "vocabulary": 257 if options.smoke else 32768,
                "batch": 2 if options.smoke else options.batch,
                "steps": 6 if options.smoke else options.steps,
                "every": 2 if options.smoke else 5,
                "skip": 1 if options.smoke else 3,
                "bf16": not options.smoke,
                "cpu": options.smoke,
                "attention": options.attention,
                "compile": options.compile,
                "checkpointing": options.checkpointing,
                "peak": options.peak_flops,
            }
            figures = measure(case) if options.smoke else in_own_process(case)
            rows.append({"name": name, "kind": kind, **figures})
            print(f"{name} {kind}: {figures['tokens_per_second']:,.0f} tokens/s", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\n{rows[0]['device']}, torch {rows[0]['torch']}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
