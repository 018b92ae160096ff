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
from attention_flops import work_of
from attention_memory import keep_freed_memory, peak_megabytes
from measure import machine
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask

from growkit.attention import gda
from growkit.modeling import GdaConfig, GrowkitConfig
from growkit.modeling.modeling_gda import ATTENTION_CLASSES

RESULTS = Path(__file__).resolve().parent / "results"
BASELINE = "gqa"
MODES = ("forward", "forward+backward")
OWN_KEYS = "gda 3:1, own keys"
# Other ways of own-keys attention than the chosen one (gda.value_path), and how rows name them.
WAYS = {
    "halves": "halves of the values",
    "wide": "one call with wide values",
    "flex_attention": "flex_attention",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def configs(heads: int, head_dim: int) -> dict[str, Any]:
    """Name -> config: ``heads`` query heads (a multiple of 8), four to a key head, equal width.

    Where a key head is a pair it counts twice; SAS simulates twice the heads, half as wide again.
    """
    kv = heads // 4
    shared = {
        "hidden_size": heads * head_dim,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "max_position_embeddings": 1 << 15,
        "attn_implementation": "sdpa",
    }

    def ours(attention: str, **fields: Any) -> GrowkitConfig:
        return GrowkitConfig(
            **{**shared, "attention": attention, "num_key_value_heads": kv, **fields}
        )

    def grouped(keys: int, **fields: Any) -> GdaConfig:
        return GdaConfig(**shared, num_key_value_heads=kv * keys, num_noise_heads=kv, **fields)

    simulation = {
        "num_simulated_heads": 2 * heads,
        "simulated_head_dim": head_dim * 3 // 2,
        "sas_kernel_size": 5,
    }
    return {
        BASELINE: ours("gqa"),
        "gda 3:1, shared keys": grouped(1, noise_keys="shared", sub_layer_norm=False),
        OWN_KEYS: grouped(2, noise_keys="own"),
        "diff_v1": ours("diff_v1"),
        "diff_v2": ours("diff_v2"),
        "gda_gated 3:1": ours("gda_gated", num_noise_heads=kv),
        "shared_diff": ours("shared_diff", query_rank=8, key_rank=8),
        "shared_diff, queries only": ours("shared_diff", query_rank=8, key_rank=0),
        "wgqa": ours("wgqa"),
        "sas": ours("sas", **simulation),
    }


def layer_of(config: Any, device: str, dtype: torch.dtype) -> nn.Module:
    """One attention layer with torch's start weights; lambda vectors stay fp32."""
    torch.manual_seed(0)
    own = config.model_type == "gda"
    kind = ATTENTION_CLASSES[config.noise_keys] if own else config.variant
    layer: nn.Module = kind(config, 0)
    for name, parameter in layer.named_parameters():
        if name not in gda.LAMBDA_NAMES:
            parameter.data = parameter.data.to(dtype)
    return layer.to(device)


def inputs_of(config: Any, n: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Hidden states [1, n, hidden_size] that want a gradient, and cos and sin."""
    hidden = torch.randn(1, n, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    angles = torch.arange(n, device=device)[:, None] * 10000.0 ** (
        -torch.arange(0, config.head_dim, 2, device=device) / config.head_dim
    )
    angles = torch.cat((angles, angles), dim=-1)[None]
    return hidden, (angles.cos().to(dtype), angles.sin().to(dtype))


def step(layer: nn.Module, hidden: Tensor, rotary: Any, mode: str, mask: Any = None) -> None:
    """One run of the layer."""
    if mode == MODES[0]:
        with torch.no_grad():
            layer(hidden, rotary, mask)
        return
    output, _ = layer(hidden, rotary)
    output.backward(torch.ones_like(output))
    layer.zero_grad(set_to_none=True)
    hidden.grad = None


def attention_inputs(config: Any, hidden: Tensor) -> list[Tensor]:
    """Query, key and value of the attention call of GQA, in the layout that projections leave."""
    n, kv = hidden.shape[1], config.num_key_value_heads
    return [
        torch.randn(1, n, heads, config.head_dim, device=hidden.device, dtype=hidden.dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (config.num_attention_heads, kv, kv)
    ]


def attend(query: Tensor, key: Tensor, value: Tensor, mode: str) -> None:
    """The attention call of GQA alone."""
    call = partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    if mode == MODES[0]:
        with torch.no_grad():
            call(query, key, value)
        return
    output = call(query, key, value)
    torch.autograd.grad(output, (query, key, value), torch.ones_like(output))


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
        plain, backward = work_of(known[BASELINE], n), mode != MODES[0]
        # how much of the baseline's time is its attention call
        share = statistics.median(
            t / base for t, base in zip(calls, times[BASELINE][1:], strict=True)
        )
        for path in order:
            name, way = paths[path]
            timed = times[path][1:]
            ratio = statistics.median(
                t / base for t, base in zip(timed, times[BASELINE][1:], strict=True)
            )
            wide = (way or chosen_way) != "halves"
            work = work_of(known[name], n, wide_values=wide)
            predicted = work.flops(backward) / plain.flops(backward)
            least = work_of(known[name], n).flops(backward) / plain.flops(backward)
            weights, attended = (
                mine / of_baseline
                for mine, of_baseline in zip(
                    work.kinds(backward), plain.kinds(backward), strict=True
                )
            )
            by_kind = (1 - share) * weights + share * attended
            median = statistics.median(timed)
            row = {
                "variant": path,
                "mode": mode,
                "tokens": n,
                "seconds": [round(t, 5) for t in timed],
                "median_s": round(median, 5),
                "tokens_per_second": round(n / median),
                "peak_mb": round(peaks[path], 1),
                "ratio": round(ratio, 3),
                "predicted": round(predicted, 3),
                "predicted_least": round(least, 3),
                "of_predicted": round(ratio / predicted, 3),
                "predicted_by_kind": round(by_kind, 3),
                "of_predicted_by_kind": round(ratio / by_kind, 3),
            }
            rows.append(row)
            print(
                f"{n:6} {mode:17} {path:44} {1000 * median:9.1f} ms {peaks[path]:8.0f} MB "
                f"{row['ratio']:6.2f} predicted {predicted:5.2f} -> {row['of_predicted']:.2f} "
                f"by kind {by_kind:5.2f} -> {ratio / by_kind:.2f}",
                flush=True,
            )
    return rows


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
