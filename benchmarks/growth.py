"""Growth of 3 GB checkpoints against a plain copy and mergekit: python benchmarks/growth.py

Prints a table and writes benchmarks/results/growth.json. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import Run, machine, run, summary
from peer_mergekit import install_mergekit, passthrough_recipe

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
Command = Callable[[Path], list[str]]


def growkit(*arguments: str | Path) -> list[str]:
    """The command line, with this interpreter."""
    return [sys.executable, "-m", "growkit", *map(str, arguments)]


def script(name: str, *arguments: str | Path | int) -> list[str]:
    """One of the scripts beside this one."""
    return [sys.executable, str(HERE / name), *map(str, arguments)]


def output_bytes(source: Path, *growth: str) -> int:
    """Bytes of tensors that a growth will write, as ``growkit plan`` says."""
    plan = subprocess.run(
        growkit("plan", source, *growth, "--json"), check=True, capture_output=True, text=True
    )
    return int(json.loads(plan.stdout)["bytes_out"])


def growth_commands(source: Path, flag: str, value: str) -> dict[str, Command]:
    """The copy of as many bytes, growkit as a command, growkit as a library."""
    field = flag.removeprefix("--").replace("-", "_")
    nbytes = output_bytes(source, flag, value)
    return {
        "copy + fsync": lambda out: script("copy_bytes.py", source, out, nbytes),
        "growkit grow": lambda out: growkit(
            "grow", source, flag, value, "--no-verify", "--quiet", "--out", out
        ),
        "growkit, in process": lambda out: script(
            "grow_in_process.py", source, out, f"{field}={value}"
        ),
    }


def core_commands(source: Path, flag: str, value: str) -> dict[str, Command]:
    """growkit as a library, held on one processor and on two."""
    field = flag.removeprefix("--").replace("-", "_")

    library = ("grow_in_process.py", source)

    def on(processors: str) -> Command:
        pinned = ["taskset", "-c", processors]
        return lambda out: [*pinned, *script(*library, out, f"{field}={value}")]

    return {"1 core": on("0"), "2 cores": on("0,1")}


def mergekit_commands(work: Path, source: Path) -> tuple[dict[str, Command], dict[str, str]]:
    """mergekit as it comes, and with the output options that make it fastest."""
    command, versions = install_mergekit(work / "mergekit")
    if command is None:
        return {}, versions
    recipe = work / "passthrough.yaml"
    recipe.write_text(passthrough_recipe(source, layers=24, added=6), encoding="utf-8")
    plain = [str(command), str(recipe)]
    # mergekit writes a billion as B.
    fast = ["--out-shard-size", "1B", "--async-write"]
    return {
        "mergekit": lambda out: [*plain, str(out), "--no-copy-tokenizer", "--quiet"],
        "mergekit, 1 GB shards, async": lambda out: [
            *plain, str(out), "--no-copy-tokenizer", "--quiet", *fast
        ],
    }, versions  # fmt: skip


def rounds(
    commands: dict[str, Command], source: Path, work: Path, count: int, cold: bool, wait: float
) -> dict[str, list[Run]]:
    """Every command once a round; each round begins with another one."""
    results: dict[str, list[Run]] = {name: [] for name in commands}
    names = list(commands)
    for number in range(count):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            out = work / "out"
            measured = run(commands[name](out), out, source=source, cold=cold, wait=wait)
            results[name].append(measured)
            print(f"  round {number + 1} {name:30} {measured.seconds:7.2f} s", flush=True)
    return results


def small_commands(trillion: Path, work: Path) -> dict[str, Any]:
    """``--help`` and the plan of a trillion parameters: seconds, memory, torch imported or not."""
    result = {}
    for name, arguments in {
        "growkit --help": ["--help"],
        "growkit plan (1 T parameters)": ["plan", str(trillion), "--layers", "x2"],
    }.items():
        runs = [
            run(growkit(*arguments), work / "out", source=None, cold=False, wait=0)
            for _ in range(7)
        ]
        code = (
            "import sys\nfrom growkit.cli.main import main\n"
            f"assert main({arguments!r}) == 0\nsys.exit('torch' in sys.modules)"
        )
        torch = subprocess.run([sys.executable, "-c", code], capture_output=True).returncode
        result[name] = summary(runs) | {"imports_torch": bool(torch)}
    return result


def compare(results: dict[str, list[Run]], name: str, base: str) -> dict[str, float]:
    """Ratio of the medians, of the minima, and range of the ratios inside one round."""
    ours, theirs = ([r.seconds for r in results[key]] for key in (name, base))
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    durable = [statistics.median(r.durable for r in results[key]) for key in (name, base)]
    return {
        "durable_of_medians": round(durable[0] / durable[1], 2),
        "of_medians": round(statistics.median(ours) / statistics.median(theirs), 2),
        "of_minima": round(min(ours) / min(theirs), 2),
        "smallest": round(min(pairs), 2),
        "largest": round(max(pairs), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", action="store_true", help="source in the page cache")
    parser.add_argument(
        "--wait", type=float, default=60, help="seconds to wait for an idle machine"
    )
    parser.add_argument("--work", type=Path, help="folder for 16 GB; kept (default: temporary)")
    parser.add_argument("--no-mergekit", action="store_true")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="growkit-benchmark-"))
    try:
        measure(options, work)
    finally:
        if options.work is None:
            shutil.rmtree(work)


def measure(options: argparse.Namespace, work: Path) -> None:
    for kind in ("llama", "gda", "mha", "trillion"):
        if not (work / kind).exists():
            subprocess.run(script("make_checkpoint.py", kind, work / kind), check=True)
    how = {"count": options.rounds, "cold": not options.warm, "wait": options.wait}
    started = time.strftime("%H:%M")
    peers, peer_versions = {}, {"error": "left out"}
    if not options.no_mergekit:
        peers, peer_versions = mergekit_commands(work, work / "llama")
    report: dict[str, Any] = {
        "machine": machine() | {"started": started},
        "page_cache": "source read into it before every run"
        if options.warm
        else "dropped before every run",
        "versions": {name: version(name) for name in ("growkit", "numpy", "ml_dtypes")},
        "mergekit": peer_versions,
        "tables": {},
    }
    tables = {
        "depth 24 -> 30 layers": ("llama", "--layers", "30", peers),
        "signal heads x2": ("gda", "--signal-heads", "x2", {}),
    }
    for title, (kind, flag, value, others) in tables.items():
        print(title)
        commands = growth_commands(work / kind, flag, value) | others
        results = rounds(commands, work / kind, work, **how)
        report["tables"][title] = {
            "summary": {name: summary(runs) for name, runs in results.items()},
            "ratios": {
                f"growkit grow / {name}": compare(results, "growkit grow", name)
                for name in results
                if not name.startswith("growkit")
            },
            "runs": {name: [asdict(r) for r in runs] for name, runs in results.items()},
        }
    # The exact split of every matrix: as much arithmetic as a growth can have.
    print("one core and two, hidden x2")
    cores = rounds(core_commands(work / "mha", "--hidden", "x2"), work / "mha", work, **how)
    report["cores"] = {name: summary(runs) for name, runs in cores.items()}
    report["commands"] = small_commands(work / "trillion", work)
    RESULTS.mkdir(exist_ok=True)
    name = "growth-warm.json" if options.warm else "growth.json"
    (RESULTS / name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_tables(report)


def print_tables(report: dict[str, Any]) -> None:
    """The report as Markdown, as it stands in README.md."""
    for title, table in report["tables"].items():
        print(f"\n{title}\n\n| | median s | min | max | on disk | CPU s | peak RSS MB |")
        print("|---|---|---|---|---|---|---|")
        for name, s in table["summary"].items():
            row = (s["median_s"], s["min_s"], s["max_s"], s["durable_median_s"], s["cpu_s"])
            row += (s["peak_mb"],)
            print(f"| {name} | " + " | ".join(f"{value:.4g}" for value in row) + " |")
        for name, ratio in table["ratios"].items():
            print(
                f"\n{name}: {ratio['of_medians']} (medians; {ratio['durable_of_medians']} until "
                f"on disk), {ratio['of_minima']} (minima), "
                f"{ratio['smallest']} to {ratio['largest']} (single rounds)"
            )
    print("\n| hidden x2 | median s | min | max | CPU s |\n|---|---|---|---|---|")
    for name, s in report["cores"].items():
        row = (s["median_s"], s["min_s"], s["max_s"], s["cpu_s"])
        print(f"| {name} | " + " | ".join(f"{value:.4g}" for value in row) + " |")
    print("\n| | median s | max | peak RSS MB | torch imported |\n|---|---|---|---|---|")
    for name, s in report["commands"].items():
        torch = "yes" if s["imports_torch"] else "no"
        print(
            f"| `{name}` | {s['median_s']:.2f} | {s['max_s']:.2f} | {s['peak_mb']:.0f} | {torch} |"
        )


if __name__ == "__main__":
    main()
