"""Run one command with a stated page cache and measure it from outside. Standard library only:
on Linux the peak memory of a child starts at its parent's, so this process has to stay small."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
IDLE = 0.9


@dataclass(frozen=True)
class Run:
    """One execution: seconds from outside and, where the command says so, its own seconds; the same
    until all its files are on the disk; peak resident megabytes (mapped file pages count, the page
    cache does not); CPU seconds; share of the processors that others used in the two seconds
    before."""

    seconds: float
    durable: float
    peak_mb: float
    cpu_seconds: float
    others: float
    wall: float


def drop_caches() -> bool:
    """Write dirty pages and empty the page cache; False without the right to do so."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n")
    except OSError:
        return False
    return True


def busy_share(seconds: float) -> float:
    """Share of all processors that was in use during the next ``seconds``."""
    before = _processor_times()
    time.sleep(seconds)
    idle, total = (b - a for a, b in zip(before, _processor_times(), strict=True))
    return 1.0 - idle / max(total, 1)


def _processor_times() -> tuple[int, int]:
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    return fields[3] + fields[4], sum(fields[:8])


def wait_for_idle(limit: float) -> float:
    """Wait up to ``limit`` seconds until the machine is idle; the busy share at the end."""
    deadline = time.monotonic() + limit
    while (busy := busy_share(2.0)) > 1.0 - IDLE and time.monotonic() < deadline:
        time.sleep(3.0)
    return busy


def read_all(folder: Path) -> None:
    """Bring the files of a folder into the page cache."""
    buffer = bytearray(1 << 20)
    for file in folder.iterdir():
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def run(command: list[str], out: Path, *, source: Path | None, cold: bool, wait: float) -> Run:
    """Run a command that writes the folder ``out``, which is removed before and after.

    ``source`` is read into the page cache first, or with ``cold`` everything is dropped from it.
    """
    shutil.rmtree(out, ignore_errors=True)
    if cold and not drop_caches():
        raise SystemExit("dropping the page cache needs root; use --warm")
    if not cold and source is not None:
        os.sync()
        read_all(source)
    others = wait_for_idle(wait)
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{text[-2000:]}")
    own = _own_seconds(text)
    syncing = _fsync_all(out)
    shutil.rmtree(out, ignore_errors=True)
    return Run(
        seconds=round(seconds if own is None else own, 3),
        durable=round((seconds if own is None else own) + syncing, 3),
        peak_mb=round(usage.ru_maxrss / 1024, 1),
        cpu_seconds=round(usage.ru_utime + usage.ru_stime, 2),
        others=round(others, 2),
        wall=round(seconds, 3),
    )


def _fsync_all(out: Path) -> float:
    """Seconds until what a command left in memory is on the disk; next to none after an fsync."""
    start = time.perf_counter()
    for file in out.rglob("*") if out.is_dir() else ():
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return time.perf_counter() - start


def _own_seconds(text: str) -> float | None:
    """The child's own figure, from a last line such as {"seconds": 1.5}."""
    lines = text.strip().splitlines()
    if not lines or not lines[-1].startswith('{"seconds"'):
        return None
    return float(json.loads(lines[-1])["seconds"])


def summary(runs: list[Run]) -> dict[str, Any]:
    """Median, smallest and largest of the runs."""
    times = [r.seconds for r in runs]
    return {
        "durable_median_s": round(statistics.median(r.durable for r in runs), 3),
        "median_s": round(statistics.median(times), 3),
        "min_s": min(times),
        "max_s": max(times),
        "peak_mb": max(r.peak_mb for r in runs),
        "cpu_s": round(statistics.median(r.cpu_seconds for r in runs), 2),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on; no name of the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu() -> str:
    """Name of the processor, as far as the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
