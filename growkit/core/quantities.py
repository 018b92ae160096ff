"""Quantities as people read them."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.4g} {unit}"
        count /= 1000
    raise AssertionError


def human_count(count: float) -> str:
    """A count with a unit: 2.597 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:#.4g} {unit}"
    return f"{count:.0f}"


def counted(count: int, noun: str) -> str:
    """``1 file``, ``49,152 files``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def percent(part: float, digits: int = 0, *, sign: bool = False) -> str:
    """A part of 1 as ``12.5 %``."""
    return f"{100 * part:{'+' if sign else ''}.{digits}f} %"


def human_seconds(seconds: float) -> str:
    """A duration: 42 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
