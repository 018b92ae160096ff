"""Tensors that differ in the same way, and the sentence that ``growkit diff`` says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from growkit.diff.difference import Difference

MOST_RANGES = 3


@dataclass
class Group:
    """The same tensor of several layers, which differ in the same way.

    Attributes:
        tensor: name, ``{layer}`` and ``{expert}`` where their numbers stand.
        status: ``unchanged``, ``different``, ``shape``, ``only in A``, ``only in B``; or by a plan
            ``copied``, ``grown``, ``rescaled``, ``zero``, ``closed``, ``lambda``, ``new``.
        layers: layers of B (of A for ``only in A``); empty for a tensor outside the layers.
        sources: layers of A that they are made of.
        experts: experts of B whose tensors these are, where each has its own.
        expert_sources: experts of A that they are made of.
        expert_copies: the experts are further copies, not the old ones.
        shared_among: copies of an expert that carry parts of one weight.
        inserted: the layers are inserted blocks or further copies, not the old ones.
        shapes: of A and of B, where there is one.
        dims: ``rows`` and ``columns`` (``entries`` of a vector): ranges [start, end) of the
            ``old``, ``copies`` and ``new`` parts, and whether copies share the weight.
        factor: every entry was multiplied by this.
        difference: figures over all layers.
    """

    tensor: str
    status: str
    layers: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    inserted: bool = False
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None)
    dims: dict[str, dict[str, Any]] = field(default_factory=dict)
    factor: float = 1.0
    difference: Difference = field(default_factory=Difference)
    experts: list[int] = field(default_factory=list)
    expert_sources: list[int] = field(default_factory=list)
    expert_copies: bool = False
    shared_among: int = 1

    @property
    def key(self) -> str:
        """Groups with equal keys are one."""
        changed = self.difference.differing > 0
        kind = (self.status, self.inserted, self.expert_copies, self.shared_among)
        return repr((self.tensor, kind, self.shapes, self.dims, changed))

    def add(self, other: Group) -> None:
        """Take the tensors of another group in."""
        _add_numbers(self.layers, self.sources, other.layers, other.sources)
        _add_numbers(self.experts, self.expert_sources, other.experts, other.expert_sources)
        self.difference.add(other.difference)

    def to_dict(self) -> dict[str, Any]:
        figures = self.difference
        return {
            "tensor": self.tensor,
            "status": self.status,
            "layers": self.layers,
            "source_layers": [source for source in self.sources if source >= 0],
            "inserted": self.inserted,
            "experts": self.experts,
            "source_experts": self.expert_sources,
            "shape_a": self.shapes[0],
            "shape_b": self.shapes[1],
            **self.dims,
            "factor": self.factor,
            "shares": {str(copies): parts for copies, parts in figures.mean_shares.items()},
            "entries": figures.entries,
            "differing": figures.differing,
            "max_difference": figures.max_difference,
            "text": group_text(self),
        }


def _add_numbers(
    numbers: list[int], sources: list[int], more: list[int], more_sources: list[int]
) -> None:
    for number, source in zip(more, more_sources, strict=True):
        if number not in numbers:
            numbers.append(number)
            sources.append(source)


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
    warm = group.status == "perturbed"
    plain = (
        not warm and group.factor == 1.0 and not any(dim["shared"] for dim in group.dims.values())
    )
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
    if warm:
        parts.append("shrunk, and a start from scratch added to every entry (warm start)")
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
