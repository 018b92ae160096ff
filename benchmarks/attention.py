"""Speed of attention variants against plain GQA: python benchmarks/attention.py

One layer of each variant, forward and forward + backward, through SDPA. Prints a table and writes
benchmarks/results/attention.json (attention-cuda.json). See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch
from attention_flops import Work, work_of
from attention_layers import (
    BASELINE,
    MODES,
    OWN_KEYS,
    attend,
    attention_inputs,
    configs,
    inputs_of,
    layer_of,
    step,
)
from attention_memory import keep_freed_memory, leave_out_of_collections, peak_megabytes
from measure import machine
from torch.nn.attention.flex_attention import create_block_mask

from growkit.variants.gda import attention as gda

RESULTS = Path(__file__).resolve().parent / "results"
# Other ways of own-keys attention than the chosen one (gda.value_path), and how rows name them.
WAYS = {
    "halves": "halves of the values",
    "wide": "one call with wide values",
    "flex_attention": "flex_attention",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def seconds_of(run: Callable[[], None], device: str) -> float:
    """Seconds of one call: of a GPU until it is done, on the CPU processor time of all threads.

    Processor time does not count the time in which other processes had the core.
    """
    if device != "cpu":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000
    begin = process_time()
    run()
    return process_time() - begin


def ways_of(options: argparse.Namespace) -> list[str | None]:
    """How own-keys GDA is measured; None: as it chooses."""
    if options.no_paths:
        return [None]
    compiles = options.device != "cpu" or any(map(shutil.which, ("g++", "clang++")))
    return [None, "halves", "wide", *(["flex_attention"] if compiles and not options.smoke else [])]


def measure(options: argparse.Namespace, n: int) -> list[dict[str, Any]]:
    """All variants and modes at one length: every round runs each once, beginning with another."""
    dtype, device = DTYPES[options.dtype], options.device
    known = configs(options.heads, options.head_dim)
    chosen = [name for name in known if name in (options.only or known) or name == BASELINE]
    paths: dict[str, tuple[str, str | None]] = {name: (name, None) for name in chosen}
    if OWN_KEYS in chosen:
        paths |= {f"{OWN_KEYS}, {WAYS[way]}": (OWN_KEYS, way) for way in ways_of(options) if way}
    layers = {name: layer_of(known[name], device, dtype) for name in chosen}
    masks: dict[str, Any] = {}
    if "flex_attention" in [way for _, way in paths.values()]:
        config = configs(options.heads, options.head_dim)[OWN_KEYS]
        config._attn_implementation = "flex_attention"
        layers["flex_attention"] = layer_of(config, device, dtype)
        masks["flex_attention"] = create_block_mask(
            lambda b, h, q, k: q >= k, None, None, n, n, device=device
        )
    chooser = gda.value_path
    rows = []
    for mode in MODES:
        hidden, rotary = inputs_of(known[BASELINE], n, device, dtype)
        heads = hidden.detach().new_empty(1, 1, n, options.head_dim)
        chosen_way = chooser("sdpa", heads, heads, None)
        order = [
            path
            for path, (_, way) in paths.items()
            if (way, mode, device) != ("flex_attention", MODES[1], "cpu")  # no backward pass there
        ]
        times: dict[str, list[float]] = {path: [] for path in order}
        peaks: dict[str, float] = {}
        calls: list[float] = []
        attention_call = partial(attend, *attention_inputs(known[BASELINE], hidden), mode)
        for number in range(-2, options.rounds):  # the first measures memory, the second warms up
            shift = number % len(order)
            for path in order[shift:] + order[:shift]:
                name, way = paths[path]
                layer = layers["flex_attention" if way == "flex_attention" else name]
                if way in ("halves", "wide"):
                    gda.value_path = lambda *_, way=way: way
                run = partial(step, layer, hidden, rotary, mode, masks.get(way or ""))
                if number == -2:
                    if way == "flex_attention":
                        run()  # compiles
                    peaks[path] = peak_megabytes(run, device)
                else:
                    times[path].append(seconds_of(run, device))
                gda.value_path = chooser
            if number >= 0:
                calls.append(seconds_of(attention_call, device))
        plain = work_of(known[BASELINE], n)
        base = times[BASELINE][1:]
        share = median_ratio(calls, base)  # of the baseline's time, in its attention call
        for path in order:
            name, way = paths[path]
            halves = (way or chosen_way) == "halves"
            works = [work_of(known[name], n, wide_values=wide) for wide in (not halves, True)]
            row = {"variant": path, "mode": mode, "tokens": n}
            row |= figures(times[path][1:], base, n, peaks[path])
            row |= predictions(*works, plain, share, mode != MODES[0], row["ratio"])
            rows.append(row)
            print(
                f"{n:6} {mode:17} {path:44} {1000 * row['median_s']:9.1f} ms "
                f"{row['peak_mb']:6.0f} MB {row['ratio']:6.2f} predicted {row['predicted']:5.2f} "
                f"-> {row['of_predicted']:.2f}, by kind {row['of_predicted_by_kind']:.2f}",
                flush=True,
            )
    return rows


def median_ratio(times: list[float], base: list[float]) -> float:
    """Of runs of the same rounds, so that what disturbs a round disturbs both."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def figures(times: list[float], base: list[float], n: int, peak: float) -> dict[str, Any]:
    """What was measured, beside the baseline of the same rounds."""
    median = statistics.median(times)
    return {
        "seconds": [round(t, 5) for t in times],
        "median_s": round(median, 5),
        "tokens_per_second": round(n / median),
        "peak_mb": round(peak, 1),
        "ratio": round(median_ratio(times, base), 3),
        "ratio_of_fastest": round(min(times) / min(base), 3),
    }


def predictions(
    work: Work, least: Work, plain: Work, share: float, backward: bool, ratio: float
) -> dict[str, float]:
    """What FLOP counts predict for the ratio, and the ratio in units of it.

    Args:
        work: what is computed.
        least: what it could be (no score twice).
        plain: the baseline's.
        share: of the baseline's time, in its attention call. By kind, products with weights go at
            the speed of the rest, and scores and values at the speed of that call.
    """
    weights, attention = (
        mine / its for mine, its in zip(work.kinds(backward), plain.kinds(backward), strict=True)
    )
    predicted = work.flops(backward) / plain.flops(backward)
    by_kind = (1 - share) * weights + share * attention
    found = {
        "predicted": predicted,
        "predicted_least": least.flops(backward) / plain.flops(backward),
        "of_predicted": ratio / predicted,
        "predicted_by_kind": by_kind,
        "of_predicted_by_kind": ratio / by_kind,
    }
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--heads", type=int, default=8, help="query heads, a multiple of 8")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, on cuda bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="these variants beside the baseline")
    parser.add_argument("--no-paths", action="store_true", help="only the path that is chosen")
    parser.add_argument(
        "--return-memory", action="store_true", help="CPU: malloc as it is, which gives pages back"
    )
    parser.add_argument("--smoke", action="store_true", help="seconds: tiny, one round")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    options.lengths = options.lengths or [512 << i for i in range(7 if cuda else 4)]
    if options.smoke:
        options.lengths, options.head_dim, options.rounds = [32], 8, 1
    torch.set_num_threads(options.threads)
    leave_out_of_collections()
    if not options.return_memory:
        keep_freed_memory()
    load_before = os.getloadavg()[0]
    rows = [row for n in options.lengths for row in measure(options, n)]
    about = {
        **machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": options.dtype,
        "heads": options.heads,
        "head_dim": options.head_dim,
        "rounds": options.rounds,
        "freed_memory_kept": not options.return_memory,
        "load_before": round(load_before, 1),
        "load_after": round(os.getloadavg()[0], 1),
    }
    out = options.out or RESULTS / ("attention-cuda.json" if cuda else "attention.json")
    text = json.dumps({"machine": about, "rows": rows}, indent=1)
    out.write_text(text + "\n", encoding="utf-8")
    judged = [row for row in rows if row["variant"] in configs(options.heads, options.head_dim)]
    within = [row for row in judged if row["of_predicted"] <= 1.15]
    print(f"{len(within)} of {len(judged)} within 1.15 of the prediction; wrote {out}")


if __name__ == "__main__":
    main()
