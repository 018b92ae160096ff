"""How much memory there is, and whether two models fit."""

from __future__ import annotations

from pathlib import Path

import torch

from growkit.verification.folder import Folder

SHARE = 0.6  # of the available memory; the rest is for activations, logits and page cache


def available_memory() -> int | None:
    """Bytes that this process may still use (the control group's limit included), or None."""
    found: list[int] = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        if limit != "max":
            found.append(max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def both_fit(a: Folder, b: Folder, dtype: torch.dtype, available: int | None = None) -> bool:
    """Both models in ``dtype`` need at most 60 % of the available memory; True when unknown."""
    available = available_memory() if available is None else available
    needed = (a.parameters + b.parameters) * dtype.itemsize
    return available is None or needed <= SHARE * available
