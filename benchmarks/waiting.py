"""What a user waits for: growth with its proof, and width growth.

    python benchmarks/waiting.py FOLDER --json benchmarks/results/waiting.json

FOLDER is a checkpoint in float32 or bfloat16 (``python tests/real/smollm2.py FOLDER`` makes one).
Answered by ratios within one run, every round beginning with another command:

* ``proof``: ``growkit grow`` with verification, against the same growth with ``--no-verify`` plus
  one forward pass over the same 512 tokens in each model. ``whole`` counts the process that makes
  the passes (torch and transformers imported, both models loaded), ``passes`` the passes alone.
* ``layerwise``: ``growkit verify --layerwise on`` of that pair, which holds one layer at a time,
  against the process that loads both models whole and makes the passes.
* ``width``: growth of the hidden size as a library, at 1 to 4 threads and the default, against a
  durable copy of as many bytes; on one core and on two (affinity).
* ``kernels``: bytes a CPU second that column maps write, against a copy in memory.

CPU seconds are those of a command and its children; seconds are from outside, and say little on a
machine that others use.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import machine

HERE = Path(__file__).resolve().parent

FORWARD = """
import sys, time, os
start = time.process_time(); began = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from growkit.samples import sample_text
ids = AutoTokenizer.from_pretrained(sys.argv[1])(sample_text()[:8000])["input_ids"][:512]
models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in sys.argv[1:]]
cpu, wall = time.process_time(), time.perf_counter()
with torch.inference_mode():
    for model in models:
        for window in torch.tensor(ids).view(4, 128):
            model(input_ids=window[None], use_cache=False)
print("FIGURES", time.process_time() - cpu, time.perf_counter() - wall)
"""


def run(command: list[str], out: Path | None = None, cold: bool = False) -> dict[str, float]:
    """Seconds from outside, CPU seconds of the command with its children, and its own figures."""
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    cpu = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    found = {"seconds": seconds, "cpu": cpu}
    for line in done.stdout.splitlines():
        if line.startswith("FIGURES"):
            found["own_cpu"], found["own_seconds"] = map(float, line.split()[1:])
    return found


def rounds(
    commands: dict[str, list[str]], count: int, out: Path, cold: bool = False
) -> dict[str, list[dict[str, float]]]:
    """Every command once a round; each round begins with another one."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    names = list(commands)
    for number in range(count):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(run(commands[name], out, cold))
            print(f"  round {number + 1} {name:28} {results[name][-1]}", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    return results


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(r[key] for r in runs), 3) for key in runs[0]} | {
        "min_seconds": round(min(r["seconds"] for r in runs), 3)
    }


def proof(folder: Path, work: Path, count: int) -> dict[str, Any]:
    """Depth x1.2 with its proof against what it cannot do without."""
    grown, out = work / "grown", work / "out"
    grow = [sys.executable, "-m", "growkit", "grow", str(folder), "--layers", "x1.2", "--quiet"]
    if not grown.is_dir():
        subprocess.run([*grow, "--no-verify", "--out", str(grown)], check=True)
    found = rounds(
        {
            "verified": [*grow, "--out", str(out)],
            "no-verify": [*grow, "--no-verify", "--out", str(out)],
            "forward": [sys.executable, "-c", FORWARD, str(folder), str(grown)],
        },
        count,
        out,
    )
    ratios: dict[str, list[float]] = {}
    triples = zip(found["verified"], found["no-verify"], found["forward"], strict=True)
    for verified, plain, forward in triples:
        for what, own in (("cpu", "own_cpu"), ("seconds", "own_seconds")):
            whole = verified[what] / (plain[what] + forward[what])
            passes = verified[what] / (plain[what] + forward[own])
            ratios.setdefault(f"{what}, whole", []).append(whole)
            ratios.setdefault(f"{what}, passes", []).append(passes)
    return {
        "medians": {name: medians(runs) for name, runs in found.items()},
        "ratios": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
    }


def layerwise(folder: Path, work: Path, count: int) -> dict[str, Any]:
    """Verification that holds one layer at a time against two models in memory and their passes."""
    grown = work / "grown"
    if not grown.is_dir():
        command = [sys.executable, "-m", "growkit", "grow", str(folder), "--layers", "x1.2"]
        subprocess.run([*command, "--quiet", "--no-verify", "--out", str(grown)], check=True)
    verify = [sys.executable, "-m", "growkit", "verify", str(folder), str(grown), "--quiet"]
    found = rounds(
        {
            "layer by layer": [*verify, "--layerwise", "on"],
            "forward": [sys.executable, "-c", FORWARD, str(folder), str(grown)],
        },
        count,
        work / "out",
    )
    pairs = list(zip(found["layer by layer"], found["forward"], strict=True))
    return {
        "medians": {name: medians(runs) for name, runs in found.items()},
        "ratios": {
            what: round(statistics.median(a[what] / b[what] for a, b in pairs), 2)
            for what in ("cpu", "seconds")
        },
    }


def width(folder: Path, work: Path, count: int, cold: bool) -> dict[str, Any]:
    """Hidden size x2 against a durable copy of as many bytes."""
    out = work / "out"
    code = (
        "import sys; from pathlib import Path; from growkit.growing import grow_checkpoint; "
        "from growkit.surgery.request import GrowthRequest; "
        "threads = int(sys.argv[3]) or None; "
        "grow_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), GrowthRequest(hidden='x2'), "
        "verify=False, threads=threads)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(out), "0"], check=True)
    nbytes = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    copy = [sys.executable, str(HERE / "copy_bytes.py"), str(folder), str(out), str(nbytes)]
    found = {}
    for cores in sorted(os.sched_getaffinity(0) & {0, 1}):
        pinned = ["taskset", "-c", ",".join(str(c) for c in range(cores + 1))]
        commands = {"copy": [*pinned, *copy]}
        for threads in (0, 1, 2, 4):
            name = f"{threads} threads" if threads else "default"
            arguments = [str(folder), str(out), str(threads)]
            commands[name] = [*pinned, sys.executable, "-c", code, *arguments]
        runs = rounds(commands, count, out, cold)
        found[f"{cores + 1} cores"] = {
            "bytes": nbytes,
            "medians": {name: medians(of) for name, of in runs.items()},
            "seconds / copy": {
                name: round(
                    statistics.median(
                        a["seconds"] / b["seconds"] for a, b in zip(of, runs["copy"], strict=True)
                    ),
                    2,
                )
                for name, of in runs.items()
            },
        }
    return found


def kernels() -> dict[str, Any]:
    """Gigabytes a CPU second that column maps write, one thread; and a copy in memory."""
    import ml_dtypes
    import numpy as np

    from growkit.surgery.dim_map import DimMap
    from growkit.surgery.expand import ColumnMoves
    from growkit.surgery.new_weights import block_rows
    from growkit.surgery.symmetry import Symmetry

    def best(work: Any) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return min(times)

    source = np.ones(1 << 28, np.uint8)
    target = np.empty_like(source)
    target[:] = 0
    found = {
        "copy in memory": round(len(source) / best(lambda: np.copyto(target, source)) / 1e9, 2)
    }
    old, rows = 576, block_rows(576)
    for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)):
        blocks = np.random.default_rng(0).standard_normal((300, rows, old)).astype(dtype)
        for what, consumes in (("split", True), ("copied", False)):
            moves = ColumnMoves(DimMap(np.tile(np.arange(old), 2), 1, consumes, old))

            def every_block(moves: Any = moves, blocks: Any = blocks) -> None:
                for i, block in enumerate(blocks):  # what is made is dropped, as after writing
                    moves.apply(block, Symmetry(), "x", i)

            seconds = best(every_block)
            found[f"{dtype.name} {what}"] = round(2 * blocks.nbytes / seconds / 1e9, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("proof", "layerwise", "width", "kernels"))
    parser.add_argument(
        "--cold", action="store_true", help="width: page cache dropped before every run (root)"
    )
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "machine": machine() | {"load": round(os.getloadavg()[0], 1)},
        "versions": {name: version(name) for name in ("growkit", "numpy", "torch", "transformers")},
        "threads of torch": os.environ.get("OMP_NUM_THREADS", "default"),
        "checkpoint bytes": sum(f.stat().st_size for f in options.folder.glob("*.safetensors")),
    }
    with tempfile.TemporaryDirectory(prefix="growkit-waiting-", dir=options.folder.parent) as work:
        if options.only in (None, "kernels"):
            report["kernels, GB written a CPU second"] = kernels()
        if options.only in (None, "width"):
            report["width, cold" if options.cold else "width"] = width(
                options.folder, Path(work), options.rounds, options.cold
            )
        if options.only in (None, "proof"):
            report["proof"] = proof(options.folder, Path(work), options.rounds)
        if options.only in (None, "layerwise"):
            report["layer by layer"] = layerwise(options.folder, Path(work), options.rounds)
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
