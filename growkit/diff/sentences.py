"""The sentences of ``growkit diff``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growkit.diff.folders import Group
    from growkit.surgery.compare import Difference

MOST_RANGES = 3


def span(numbers: Sequence[int]) -> str:
    """``0-2, 4, 6-8`` for sorted whole numbers."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return _joined([(first, last + 1) for first, last in runs], 2 * MOST_RANGES)


def _joined(ranges: Sequence[tuple[int, int]], most: int = MOST_RANGES) -> str:
    words = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in ranges]
    if len(words) <= most + 1:
        return ", ".join(words)
    return f"{', '.join(words[:most])}, ... ({len(words)} ranges)"


def group_text(group: Group) -> str:
    """How the tensors of a group differ, in one line."""
    if not group.experts:
        return _text(group)
    of = f" (copies of {span(sorted(set(group.expert_sources)))})" if group.expert_copies else ""
    word = "expert" if len(group.experts) == 1 else "experts"
    return f"{word} {span(group.experts)}{of}: {_text(group)}"


def _text(group: Group) -> str:
    figures = group.difference
    if group.status == "shape":
        return f"shape {list(group.shapes[0] or ())} in A, {list(group.shapes[1] or ())} in B"
    if group.status in ("unchanged", "only in A", "only in B"):
        return group.status
    if group.status == "new":
        return "new, without a source"
    if group.status in ("zero", "closed"):
        what = "zero" if group.status == "zero" else "gain zero"
        return f"{what}, so the block adds nothing" if not figures.differing else _changed(figures)
    plain = group.factor == 1.0 and not any(dim["shared"] for dim in group.dims.values())
    parts = [
        _dim_text(label, dim, figures, "unchanged" if plain and not figures.differing else "old")
        for label, dim in group.dims.items()
        if set(dim) - {"shared", "old"} or dim["shared"]
    ]
    if group.dims and not parts:
        parts.append("the same units in another order")
    if group.shared_among > 1:
        parts.append(
            f"{group.shared_among} copies of an expert carry {group.shared_among} times their "
            "part of the weight"
        )
    elif group.factor != 1.0:
        parts.append(f"multiplied by {group.factor:.6g}")
    if group.status == "redrawn":
        parts.append("a part of the FFN units drawn anew")
    if group.status == "lambda":
        parts.append("moved so that lambda keeps its value")
    shared = any(dim["shared"] for dim in group.dims.values())
    if figures.differing and not shared:
        parts.append(_changed(figures))
    elif not parts:
        parts.append("unchanged")
    return "; ".join(parts)


def _dim_text(label: str, dim: dict[str, Any], figures: Difference, kept: str) -> str:
    old, copies = (_joined(dim.get(kind, [])) for kind in ("old", "copies"))
    if dim["shared"]:
        shares = "; ".join(
            f"share mean {', '.join(f'{part:.2f}' for part in parts)}"
            + (f" where {count} share" if len(figures.mean_shares) > 1 else "")
            for count, parts in figures.mean_shares.items()
        )
        proof = (
            f"sum off by at most {figures.max_difference:.3g}" if figures.differing else "sum exact"
        )
        figures_text = ", ".join(filter(None, (shares, proof)))
        text = f"{label} {old} and copies {copies} divide the weight ({figures_text})"
    else:
        text = f"{label} {old} {kept}"
        if copies:
            text += f", {copies} copies"
    for kind, label in (("new", "new"), ("zero", "new (zero)"), ("mean", "new (mean of the old)")):
        if ranges := dim.get(kind):
            text += f", {_joined(ranges)} {label}"
    return text


def _changed(figures: Difference) -> str:
    fraction = figures.differing / max(figures.entries, 1)
    return f"{fraction:.3%} of entries changed, max |d| {figures.max_difference:.3g}"
