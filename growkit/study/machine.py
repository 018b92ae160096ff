"""The machine of a run in words that say nothing of whose it is. torch only where it is loaded."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from growkit import __version__


def machine() -> dict[str, Any]:
    """Processor, cores and versions; the accelerator and torch where torch is imported."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "growkit": __version__,
    }
    if "torch" in sys.modules:
        import torch

        found["torch"] = torch.__version__
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["accelerator"] = torch.cuda.get_device_name(0)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
