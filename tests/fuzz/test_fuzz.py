# SPDX-License-Identifier: Apache-2.0
"""Damaged folders end in a sentence: no traceback, no hang, no partial output, bounded memory.

500 cases in every run of the tests; ``pytest -m fuzz`` runs 10,000 (minutes).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")


def run(folder: Path, first: int, count: int) -> None:
    """Run cases in one process, and report each fault with the seed that makes it again."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), str(first), str(count)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    died = f"died at seed {(folder / 'seed').read_text()}: {done.stderr[-1000:]}"
    assert lines and "cases" in lines[-1], died
    assert lines[-1] == {"cases": count, "faults": 0}, json.dumps(lines[:5], indent=1)


def test_500_damaged_folders(tmp_path: Path) -> None:
    run(tmp_path, 0, 500)


@pytest.mark.fuzz
def test_10000_damaged_folders(tmp_path: Path) -> None:
    for first in range(10_000, 20_000, 1000):
        run(tmp_path / str(first), first, 1000)
