"""Every operator on a trained model: python benchmarks/matrix/smollm2.py CHECKPOINT

CHECKPOINT is a folder of SmolLM2-135M (the tests make one). Each operator grows it through the
command line, with verification; the table goes to smollm2.md beside this file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GROWTHS = (
    ("--layers", "36"),
    ("--layers", "36", "--layer-placement", "end"),
    ("--query-heads", "x2"),
    ("--query-heads", "x2", "--symmetry", "even"),
    ("--query-heads", "x2", "--new-heads", "zero"),
    ("--kv-heads", "x3"),
    ("--heads", "x2"),
    ("--ffn", "x1.5"),
    ("--ffn", "x1.5", "--new-units", "zero"),
    ("--hidden", "x2"),
    ("--hidden", "648"),
    ("--experts", "4"),
    ("--untie-embeddings",),
    ("--heads", "x2", "--ffn", "x1.5", "--layers", "+2", "--hidden", "x2", "--experts", "2"),
)


def grow(checkpoint: Path, out: Path, growth: tuple[str, ...]) -> dict[str, Any]:
    """Manifest of one growth; raises where it fails."""
    command = [sys.executable, "-m", "growkit", "grow", str(checkpoint), *growth]
    command += ["--out", str(out), "--overwrite", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    manifest: dict[str, Any] = json.loads(done.stdout)
    return manifest


def main(checkpoint: Path) -> None:
    lines = [
        "# Every operator on SmolLM2-135M",
        "",
        f"512 tokens of English, float32, through transformers; {time.strftime('%Y-%m-%d')}, made "
        "by `smollm2.py`.",
        "",
        "| growth | parameters | label | max abs d logit | perplexity before | after |",
        "|---|---:|---|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for growth in GROWTHS:
            manifest = grow(checkpoint, Path(folder) / "out", growth)
            proof, plan = manifest["verification"], manifest["plan"]
            row = (
                f"| `{' '.join(growth)}` | {plan['after']['parameters'] / 1e6:.1f} M | "
                f"{plan['exactness']} | {proof['max_difference']:.2g} | "
                f"{proof['perplexity_a']:.5f} | {proof['perplexity_b']:.5f} |"
            )
            print(row, flush=True)
            lines.append(row)
    (HERE / "smollm2.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
