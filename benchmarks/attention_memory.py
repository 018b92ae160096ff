"""Peak memory of one call, beyond what was in use before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Have malloc (glibc) keep what is freed, as the allocators that torch recommends for CPUs do.

    Otherwise large tensors are mapped anew at every call, and the kernel's zeroing of their pages
    is a cost of the allocator that no FLOP count knows: up to a fifth of a call of SAS.
    """
    libc = ctypes.CDLL(None)
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 1 << 30)):
        libc.mallopt(parameter, value)


def leave_out_of_collections() -> None:
    """Collections of garbage pass over all that is there: torch alone takes a tenth of a second."""
    gc.collect()
    gc.freeze()


def peak_megabytes(run: Callable[[], None], device: str) -> float:
    """Megabytes: of the allocator on a GPU, of the process's resident set on Linux."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process kept would hide new memory
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is resident
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1e6


def _resident(field: str) -> float:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
