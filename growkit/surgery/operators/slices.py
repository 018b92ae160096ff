"""Depth by slices of the source's layers, in any order: the model of a frankenmerge.

    --layers-from 0-24,8-32      layers 0 .. 23, then 8 .. 31

Ranges are half-open, as mergekit's ``layer_range`` is. Stacking, interpolation and SOLAR's overlap
are slices too (:mod:`growkit.surgery.operators.depth`). A layer that stands twice computes twice:
another function, to be trained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from growkit.core.errors import UsageError
from growkit.surgery.amount import Amount
from growkit.surgery.effect import (
    Effect,
    Exactness,
    LayerMap,
    LayerSource,
    ModelShape,
    require_axis,
)
from growkit.surgery.layer_pattern import pattern_notes
from growkit.surgery.operators import OperatorRow
from growkit.surgery.request import GrowthRequest

Slice = tuple[int, int]
OPTION = "--layers-from"
HALF_OPEN = "Ranges are half-open, as in mergekit: 0-24,8-32 are the layers 0 to 23, then 8 to 31."
_SLICE = re.compile(r"(\d{1,9})([-:])(\d{1,9})")


@dataclass(frozen=True)
class Slices:
    """The layers of the grown model are slices [start, end) of the source's, one after another.

    Attributes:
        text: as given, ``0-24,8-32``; ``:`` in place of ``-`` is read the same way.
    """

    axis: ClassVar[str] = "layer"
    text: str

    @property
    def amount(self) -> Amount:
        """Layers that are asked for."""
        return Amount.parse(str(sum(end - start for start, end in parse_slices(self.text))), OPTION)

    def apply(self, shape: ModelShape) -> Effect:
        require_axis(shape, "layer", "--layers")
        layers = shape.sizes["layer"]
        slices = parse_slices(self.text)
        highest = max(end for _, end in slices)
        if highest > layers:
            raise UsageError(
                f"{OPTION} {self.text} asks for layer {highest - 1}, but the checkpoint has layers "
                f"0 to {layers - 1}.",
                f"{HALF_OPEN} The highest end is {layers}.",
            )
        if highest == layers - 1 and "-" in self.text:
            raise UsageError(
                f"{OPTION} {self.text} could mean with or without the last layer, {layers - 1}.",
                f"{HALF_OPEN} Write an end of {layers} to have the last layer, or ':' in place of "
                "'-' to leave it out.",
            )
        sources = layers_of(slices)
        if len(sources) <= layers:
            raise UsageError(
                f"{OPTION} {self.text} makes {len(sources)} layers of {layers}.",
                f"Growth adds layers. {HALF_OPEN}",
            )
        absent = sorted(set(range(layers)) - {layer.source for layer in sources})
        missing = f"; left out: {', '.join(map(str, absent))}" if absent else ""
        return Effect(
            operator="layers",
            summary=f"layers {layers} -> {len(sources)} (slices {written(slices)}{missing})",
            stacks={"layer": sources},
            exactness=Exactness.NOT_EXACT,
            reason="slices repeat computing layers: another function, to be trained",
            warnings=(
                f"{OPTION} does not keep the function",
                *pattern_notes(shape, sources),
            ),
        )


def written(slices: Sequence[Slice]) -> str:
    """The slices as text."""
    return ", ".join(f"{start}-{end}" for start, end in slices)


def parse_slices(text: str) -> list[Slice]:
    """[start, end) of every slice of ``0-24,8-32``. Raises UsageError."""
    slices = []
    for part in text.strip("[]").split(","):
        match = _SLICE.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"{OPTION} {text!r} has no range in {part.strip()!r}.", HALF_OPEN)
        start, end = int(match[1]), int(match[3])
        if end <= start:
            raise UsageError(f"{OPTION} {text!r}: the range {part.strip()} is empty.", HALF_OPEN)
        slices.append((start, end))
    return slices


def layers_of(slices: Sequence[Slice]) -> LayerMap:
    """The layers of the slices; what stands a second time is a copy."""
    seen: set[int] = set()
    result = []
    for start, end in slices:
        for layer in range(start, end):
            result.append(LayerSource(layer, "copy" if layer in seen else "kept"))
            seen.add(layer)
    return tuple(result)


def make(row: OperatorRow, text: str, request: GrowthRequest) -> Slices:
    if request.layers or request.new_layers or request.depth_method != "identity":
        raise UsageError(
            "--layers-from names every layer of the grown model, so --layers and "
            "--depth-method have nothing to say.",
            "Give one or the other.",
        )
    return Slices(text)


def grows(row: OperatorRow, shape: ModelShape) -> bool:
    """Every model does, but it is another function: --layers is what to recommend."""
    return False
