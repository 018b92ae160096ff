"""The table of the full growth matrix, from the lines that its run appended.

    GROWKIT_MATRIX=/tmp/matrix.jsonl pytest -m matrix -n 2 tests/end_to_end/test_matrix.py
    python benchmarks/matrix/table.py /tmp/matrix.jsonl

A run that was stopped continues by the same command. Writes ``README.md`` and ``results.json``
beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

ORDER = ("bit-exact", "exact", "rounded", "not-exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--machine", default=f"{os.cpu_count()} virtual cores")
    arguments = parser.parse_args()
    import growth_matrix as matrix

    known = set(matrix.full_matrix())
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in arguments.record.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        cell = matrix.Cell(**result["cell"])
        if cell in known:
            found.setdefault((cell.family, cell.operator), []).append(result)
    cells = [_summary(matrix, *key, results) for key, results in found.items()]
    document = {"setting": _setting(arguments.machine), "cells": cells}
    (HERE / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (HERE / "README.md").write_text(_page(matrix, document), encoding="utf-8")


def _setting(machine: str) -> dict[str, str]:
    import numpy
    import torch
    import transformers

    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "compute": "float32, one thread",
    }


def _summary(
    matrix: Any, family: str, operator: str, results: list[dict[str, Any]]
) -> dict[str, Any]:
    worst = max(results, key=lambda result: result["difference"])
    return {
        "family": family,
        "operator": operator,
        "exactness": sorted({r["exactness"] for r in results}, key=ORDER.index),
        "combinations": len({json.dumps(r["cell"], sort_keys=True) for r in results}),
        "of": len(matrix.cells(family, operator)),
        "largest_difference": worst["difference"],
        "logit_rms_there": worst["rms"],
        "largest_part_of_tolerance": max(r["difference"] / r["allowed"] for r in results),
        "smallest_part_of_tolerance": min(r["difference"] / r["allowed"] for r in results),
    }


def _page(matrix: Any, document: dict[str, Any]) -> str:
    setting, cells = document["setting"], document["cells"]
    by_key = {(cell["family"], cell["operator"]): cell for cell in cells}
    run = sum(cell["combinations"] for cell in cells)
    whole = len(matrix.full_matrix())
    exact = [c for c in cells if "not-exact" not in c["exactness"]]
    lines = [
        "# The growth matrix",
        "",
        "Every family x every operator that it allows x {tied, untied} x {MHA, GQA, MQA} x {bias, "
        "none} x {float32, bfloat16} x {one file, three shards}, on tiny random checkpoints "
        "written by transformers (Motif, which transformers has no class for: by hand). Each is "
        "grown through the public path, loaded by transformers with no key missing, unexpected or "
        "of another shape, and compared on 80 tokens in float32.",
        "",
        f"{run:,} of {whole:,} combinations, {setting['date']}, {setting['machine']}, Python "
        f"{setting['python']}, torch {setting['torch']}, transformers {setting['transformers']}, "
        f"numpy {setting['numpy']}; {setting['compute']}. Made by `table.py` (see there).",
        "",
        "A cell gives the label of the plan and the largest |d logit| over its combinations: `=` "
        "bit-exact (the same numbers are added, or zeros; kernels that sum longer rows in another "
        "order show 1e-6 all the same), `e` exact, `r` rounded (new weights rounded to bfloat16, "
        "or a factor that is no power of two), `x` not exact (another function, as it says). "
        "`.` is refused with the "
        "reason. Labels differ by combination where two are given; `n/m` counts combinations where "
        "not all were run. Logits have an rms of 0.1 to 4.",
        "",
        f"Over all combinations that promise to keep the function the largest difference is "
        f"{max(c['largest_part_of_tolerance'] for c in exact):.2f} of the tolerance that "
        "`growkit verify` allows; the smallest of those that do not keep it is "
        f"{min(c['smallest_part_of_tolerance'] for c in cells if c not in exact):.0f} tolerances.",
        "",
    ]
    families = list(matrix.ALL_FAMILIES)
    half = (len(families) + 1) // 2
    for part in (families[:half], families[half:]):
        lines += [
            "| operator | " + " | ".join(part) + " |",
            "|---|" + "---|" * len(part),
        ]
        for operator in matrix.OPERATORS:
            texts = [_text(matrix, f, operator, by_key.get((f, operator))) for f in part]
            lines.append(f"| `{operator}` | " + " | ".join(texts) + " |")
        lines.append("")
    return "\n".join(lines)


def _text(matrix: Any, family: str, operator: str, cell: dict[str, Any] | None) -> str:
    if not matrix.cells(family, operator):
        return "."
    if cell is None:
        return "not run"
    signs = {"bit-exact": "=", "exact": "e", "rounded": "r", "not-exact": "x"}
    text = "".join(signs[label] for label in cell["exactness"])
    difference = cell["largest_difference"]
    text += " 0" if difference == 0 else f" {difference:.0e}".replace("e-0", "e-")
    if cell["combinations"] < cell["of"]:
        text += f" ({cell['combinations']}/{cell['of']})"
    return text


if __name__ == "__main__":
    main()
