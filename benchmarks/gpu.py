"""Everything that one GPU is asked, in one script that writes one JSON, in 13 minutes at most.

    python benchmarks/gpu.py                # writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --smoke        # tiny, on the CPU (tested)

1. ``training``: a step of a 350 M Llama and of GDA alike (`growkit train`, bf16, compiled):
   tokens a second, MFU, peak memory, counted as in :mod:`training_throughput`.
2. ``attention``: a layer of every variant beside GQA, bf16, forward and forward + backward, 2 k to
   32 k tokens, by three backends: ``sdpa`` (torch chooses the kernel), ``flash`` (SDPA held to its
   flash kernel) and ``flex`` (compiled flex_attention). A ratio is the median of the ratios to GQA
   within a round.

What a backend cannot do (flash with wide values) or has no memory for is a row with its reason. The
file is written anew after every part: a machine that is taken away leaves what was measured.

It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import training_throughput
from attention import RESULTS, seconds_of
from attention_flops import work_of
from attention_layers import BASELINE, MODES, configs, inputs_of, layer_of, step
from attention_memory import leave_out_of_collections, peak_megabytes
from measure import machine
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

BACKENDS = ("sdpa", "flash", "flex")


def training_rows(smoke: bool, peak: float | None) -> list[dict[str, Any]]:
    """Llama and GDA of one shape."""
    shapes = training_throughput.SMOKE if smoke else training_throughput.SHAPES
    name = "tiny" if smoke else "350M"
    rows = []
    for kind in ("llama", "gda"):
        case = {
            "kind": kind, "shape": shapes[name], "length": 32 if smoke else 2048,
            "vocabulary": 257 if smoke else 32768, "batch": 2 if smoke else 8,
            "steps": 6 if smoke else 40, "every": 2 if smoke else 5, "skip": 1 if smoke else 3,
            "bf16": not smoke, "cpu": smoke, "attention": None, "compile": not smoke,
            "checkpointing": False, "peak": peak,
        }  # fmt: skip
        run = training_throughput.measure if smoke else training_throughput.in_own_process
        row: dict[str, Any] = {"name": name, "kind": kind}
        try:
            row |= run(case)
        except Exception as error:  # the other parts are still worth their minutes
            row["error"] = reason(error)
        rows.append(row)
        print(row, flush=True)
    return rows


def reason(error: Exception) -> str:
    """One line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def attention_rows(
    n: int, backend: str, options: argparse.Namespace, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Every variant at one length by one backend, in turn within every round."""
    device = options.device
    known = configs(options.heads, options.head_dim)
    layers, mask = {}, None
    for name, config in known.items():
        config._attn_implementation = "flex_attention" if backend == "flex" else "sdpa"
        layers[name] = layer_of(config, device, dtype)
    if backend == "flex":
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, n, n, device=device)
    rows = []
    for mode in MODES:
        hidden, rotary = inputs_of(known[BASELINE], n, device, dtype)
        times: dict[str, list[float]] = {}
        failed: dict[str, str] = {}
        peaks: dict[str, float] = {}

        def run(name: str, mode: str = mode, hidden: Any = hidden, rotary: Any = rotary) -> None:
            held = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if backend == "flash" else nullcontext()
            with held:
                step(layers[name], hidden, rotary, mode, mask)

        for name in known:  # warms up and compiles, then measures memory
            try:
                run(name)
                peaks[name] = peak_megabytes(lambda name=name: run(name), device)
                times[name] = []
            except Exception as error:  # no kernel, no memory
                failed[name] = reason(error)
                hidden.grad = None
        order = list(times)
        for number in range(options.rounds):
            shift = number % max(len(order), 1)
            for name in order[shift:] + order[:shift]:
                times[name].append(seconds_of(lambda name=name: run(name), device))
        base = times.get(BASELINE)
        backward = mode == MODES[1]
        plain = work_of(known[BASELINE], n).flops(backward)
        for name, config in known.items():
            row: dict[str, Any] = {"variant": name, "backend": backend, "mode": mode, "tokens": n}
            if name in failed:
                rows.append(row | {"error": failed[name]})
                continue
            median = statistics.median(times[name])
            row |= {"median_s": median, "tokens_per_second": round(n / median)}
            row |= {"peak_mb": round(peaks[name], 1)}
            row["predicted"] = round(work_of(config, n).flops(backward) / plain, 3)
            if base:
                pairs = zip(times[name], base, strict=True)
                row["ratio"] = round(statistics.median(t / b for t, b in pairs), 3)
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, float32, on the CPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048 << i for i in range(5)])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--heads", type=int, default=16, help="query heads, a multiple of 8")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=780, help="begin no part after so long")
    parser.add_argument("--peak-flops", type=float, help="of the device, for MFU")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args(arguments)
    dtype = torch.bfloat16
    if options.smoke:
        options.device, dtype = "cpu", torch.float32
        options.lengths, options.heads, options.head_dim, options.rounds = [32], 8, 8, 1
    leave_out_of_collections()
    began = time.monotonic()
    report: dict[str, Any] = {
        "machine": machine() | {
            "torch": torch.__version__,
            "device": "cpu" if options.device == "cpu" else torch.cuda.get_device_name(),
            "dtype": str(dtype).removeprefix("torch."),
        },
        "training": training_rows(options.smoke, options.peak_flops),
        "attention": [],
        "left out": [],
    }  # fmt: skip
    for n in options.lengths:
        for backend in options.backends:
            if time.monotonic() - began > options.seconds:
                report["left out"].append(f"{backend}, {n} tokens")
            else:
                report["attention"] += attention_rows(n, backend, options, dtype)
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(f"{time.monotonic() - began:.0f} s: {backend}, {n} tokens", flush=True)


if __name__ == "__main__":
    main()
