# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments, and two growths at once: never a folder that is not whole."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import faults
import pytest
import tiny_checkpoints as tiny

pytestmark = [
    pytest.mark.kill,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks"),
]

KILLS, RACES = (int(os.environ.get(f"GROWKIT_{name}", 1000)) for name in ("KILLS", "RACES"))


def command(source: Path, out: Path, *more: str) -> list[str]:
    options = ["--ffn", "x2", "--no-verify", "--threads", "1", "-q", *more]
    return ["grow", str(source), "--out", str(out), *options]


def start(arguments: list[str]) -> int:
    """A growth in a forked child; its process id."""
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os._exit(faults.main(arguments))
        finally:
            os._exit(99)
    return child


def end(child: int) -> int:
    """Its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole(out: Path) -> dict[str, bytes] | None:
    """Content of the folder without the marker of an unfinished publication."""
    found = faults.content(out)
    if found is not None:
        found.pop(".growkit-partial", None)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.make_folder(tmp_path / "source", tiny.llama_config(num_hidden_layers=1))


@pytest.fixture
def wanted(source: Path, tmp_path: Path) -> dict[str, bytes]:
    assert faults.main(command(source, tmp_path / "wanted" / "out")) == 0
    found = faults.content(tmp_path / "wanted" / "out")
    assert found is not None
    return found


def test_kills(source: Path, tmp_path: Path, wanted: dict[str, bytes]) -> None:
    started = time.monotonic()
    assert end(start(command(source, tmp_path / "timed" / "out"))) == 0
    length = time.monotonic() - started
    draw, counts = random.Random(0), {"killed": 0, "new": 0, "old": 0, "none": 0}
    for number in range(KILLS):
        home = tmp_path / "case"
        out = home / "out"
        more = ["--overwrite"] if number % 2 else []
        old = {"config.json": b"{}"} if more else None
        if more:
            out.mkdir(parents=True)
            (out / "config.json").write_bytes(b"{}")
        child = start(command(source, out, *more))
        time.sleep(draw.uniform(0, 1.1 * length))
        os.kill(child, signal.SIGKILL)
        code = end(child)
        found = whole(out)
        assert found in (wanted, old), (number, code, found and sorted(found))
        counts["killed"] += code == -signal.SIGKILL
        counts["none" if found is None else "new" if found == wanted else "old"] += 1
        if number % 10 == 0:  # the same command again cleans up and ends well
            assert end(start(command(source, out, *more))) == 0
            assert faults.content(out) == wanted and os.listdir(home) == ["out"]
        shutil.rmtree(home, ignore_errors=True)
    print(counts)
    assert counts["killed"] > KILLS / 2


def test_races_of_two(source: Path, tmp_path: Path, wanted: dict[str, bytes]) -> None:
    """Both may end well (the later one finds the folder) or one is refused; it is whole."""
    draw, counts = random.Random(1), dict[tuple[int, ...], int]()
    for number in range(RACES):
        home = tmp_path / "case"
        home.mkdir()
        more = ["--overwrite"] if number % 2 else []
        children = []
        for _ in range(2):
            children.append(start(command(source, home / "out", *more)))
            time.sleep(draw.uniform(0, 0.02))
        killed = number % 4 == 3
        if killed:
            time.sleep(draw.uniform(0, 0.1))
            os.kill(children[draw.randrange(2)], signal.SIGKILL)
        codes = tuple(sorted(end(child) for child in children))
        counts[codes] = counts.get(codes, 0) + 1
        found = whole(home / "out")
        assert found in ((wanted, None) if killed else (wanted,)), (number, codes)
        assert killed or (0 in codes and set(codes) <= {0, 1, 2}), codes
        assert killed or os.listdir(home) == ["out"], (number, codes)
        shutil.rmtree(home)
    print(counts)
