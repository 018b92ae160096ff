"""growkit beside the tools that people use today: python benchmarks/peers/compare.py

One source, one machine, one run: seconds, peak memory, does transformers 5 load the result, and how
far do its logits move. Prints tables and writes benchmarks/peers/results.json. See README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from measure import machine, run, summary  # noqa: E402
from peer_mergekit import CONSTRAINTS, install_mergekit, passthrough_recipe  # noqa: E402

OLD_TRANSFORMERS = ["transformers==4.45.2", "numpy<2.3"]


@dataclass(frozen=True)
class Task:
    """One growth that several tools can do.

    Attributes:
        title: of its table.
        source: kind of ``make_checkpoint.py``.
        layers, added: for depth growth, blocks before and inserted blocks; 0 for width.
        growth: growkit's flags.
        rounds: runs of every tool; each round begins with another one.
    """

    title: str
    source: str
    layers: int
    added: int
    growth: tuple[str, ...]
    rounds: int


WIDTH = ("--hidden", "x2", "--ffn", "x2", "--symmetry", "even")
TASKS = (
    Task("Depth 24 -> 30, Llama, 3.28 GB", "llama", 24, 6, ("--layers", "30"), 3),
    Task("Depth 8 -> 10, Qwen3 (layer_types)", "qwen3", 8, 2, ("--layers", "10"), 1),
    Task("Width x2, Llama, MHA", "mha", 0, 0, (*WIDTH, "--heads", "x2"), 3),
    Task("Width x2, Llama, GQA", "gqa", 0, 0, (*WIDTH, "--query-heads", "x2"), 1),
    Task("Width x2, Llama, tied embeddings", "tied", 0, 0, (*WIDTH, "--heads", "x2"), 1),
)


def old_environment(folder: Path) -> Path:
    """Python of an environment with transformers 4.45 and the project's torch."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        torch = next(
            line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch==")
        )
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, torch], check=True)
        subprocess.run([*pip, torch, "safetensors", *OLD_TRANSFORMERS], check=True)
    return python


def commands(task: Task, source: Path, out: Path, work: Path) -> dict[str, list[str]]:
    """Tool -> command line."""
    ours = [sys.executable, "-m", "growkit", "grow", str(source), *task.growth]
    result = {"growkit": [*ours, "--no-verify", "--quiet", "--out", str(out)]}
    if not task.layers:
        python = str(old_environment(work / "old"))
        result["HyperCloning"] = [python, str(HERE / "hypercloning.py"), str(source), str(out), "2"]
        return result
    mergekit, _ = install_mergekit(work / "mergekit")
    if mergekit is not None:
        recipe = work / f"{task.source}.yaml"
        recipe.write_text(passthrough_recipe(source, layers=task.layers, added=task.added))
        result["mergekit"] = [
            str(mergekit), str(recipe), str(out), "--no-copy-tokenizer", "--quiet"
        ]  # fmt: skip
    result["llama_pro"] = [
        sys.executable, str(HERE / "llama_pro.py"), str(source), str(out), str(task.added)
    ]  # fmt: skip
    return result


def check(command: list[str], source: Path, out: Path) -> dict[str, Any]:
    """Run a tool once more and look at what it wrote."""
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        return {"exit": done.returncode, "error": lines[-1][:160], "loads": False}
    looked = subprocess.run(
        [sys.executable, str(HERE / "check.py"), str(source), str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    return {"exit": 0} | dict(json.loads(looked.stdout.splitlines()[-1]))


def compare(task: Task, work: Path, wait: float) -> dict[str, Any]:
    """All tools on one task."""
    source, out = work / task.source, work / "out"
    if not source.exists():
        maker = HERE.parent / "make_checkpoint.py"
        subprocess.run([sys.executable, str(maker), task.source, str(source)], check=True)
    tools = commands(task, source, out, work)
    print(task.title, flush=True)
    table = {name: check(command, source, out) for name, command in tools.items()}
    working = [name for name in tools if table[name]["exit"] == 0]
    runs: dict[str, list[Any]] = {name: [] for name in working}
    for number in range(task.rounds):
        shift = number % len(working)
        for name in working[shift:] + working[:shift]:
            runs[name].append(run(tools[name], out, source=source, cold=False, wait=wait))
            print(f"  round {number + 1} {name:14} {runs[name][-1].seconds:7.2f} s", flush=True)
    for name, measured in runs.items():
        table[name] |= summary(measured)
    return table


def print_table(title: str, table: dict[str, Any]) -> None:
    """A table as Markdown, as it stands in README.md."""
    print(f"\n**{title}**\n\n| | s | peak RSS MB | loads | max change of a logit |")
    print("|---|---|---|---|---|")
    for name, row in table.items():
        if row["exit"]:
            print(f"| {name} | fails | | no: {row['error']} | |")
            continue
        loads = "yes" if row["loads"] else f"no: {row.get('error', row)}"
        change = row.get("max_logit_change")
        logits = f"{change:.2g} of {row['scale']:.2g}" if change is not None else ""
        print(f"| {name} | {row['median_s']:.1f} | {row['peak_mb']:.0f} | {loads} | {logits} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder for 12 GB; kept (default: temporary)")
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait for idle cores")
    parser.add_argument("--only", help="kind of source")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="growkit-peers-"))
    work.mkdir(parents=True, exist_ok=True)
    started = time.strftime("%H:%M")
    try:
        tables = {
            task.title: compare(task, work, options.wait)
            for task in TASKS
            if options.only in (None, task.source)
        }
    finally:
        if options.work is None:
            shutil.rmtree(work)
    report = {"machine": machine() | {"started": started}, "tables": tables}
    if options.only is None:
        (HERE / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for title, table in tables.items():
        print_table(title, table)


if __name__ == "__main__":
    main()
