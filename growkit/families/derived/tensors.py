"""Tensors with named axes, from the entries of a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from growkit.core.errors import UsageError
from growkit.families.base import Dim, Tensor, every_layer
from growkit.families.derived.config_sizes import ConfigSizes
from growkit.families.derived.units import fixed, layout_of, untold
from growkit.families.unit_layout import Sizes


class TableTensors:
    """Makes the tensors of a family.

    ``read``: the config.
    """

    def __init__(self, read: ConfigSizes) -> None:
        self.read, self.table = read, read.table

    def tensor(self, entry: Mapping[str, Any]) -> Tensor:
        """The tensor of one entry of the table."""
        pattern = entry.get("layers")
        predicate: Callable[[Sizes, int], bool] = every_layer
        if pattern is not None:
            rule = self.table["patterns"][pattern]["rule"]
            predicate = _in_mask(f"layers:{pattern}", str(rule[1]) if rule else "", entry["name"])
        tied = entry["role"] == "lm_head" and self.table["tied"] in ("flag", "^flag")
        closes = entry.get("closes")
        keys: dict[int, list[tuple[str, int]]] = {}
        for place, axis, part in entry.get("keys", ()):
            keys.setdefault(place, []).append((axis, part))
        return Tensor(
            role=entry["role"],
            name=entry["name"],
            # A tensor of three dimensions is written matrix by matrix.
            dims=tuple(
                self._dim(
                    dim,
                    single=len(entry["dims"]) > 2 and not place,
                    keys=keys.get(place),
                    layers=-1 if pattern is None else self.read.masks[pattern],
                )
                for place, dim in enumerate(entry["dims"])
            ),
            when=(lambda sizes: not sizes["tied"]) if tied else (lambda sizes: True),
            writes_residual=closes is not None,
            init=entry.get("init", "normal"),
            gain_offset=-closes if closes and closes < 0 else entry.get("gain_offset", 0.0),
            closed_at=closes if closes and closes > 0 else None,
            passes_on=entry.get("passes_on"),
            layers=predicate,
            stack=entry.get("stack", "layer"),
            of_experts=bool(entry.get("of_experts")),
        )

    def carried(self, name: str, shape: Sequence[int]) -> tuple[Dim, ...]:
        """Dimensions of a tensor of another part: as they are stored, but where it writes the
        residual stream."""
        dims = next((d for p, d in self.table.get("projected", ()) if re.fullmatch(p, name)), None)
        return tuple(
            self._dim(dims[place], single=False) if dims and dims[place] else Dim(fixed(width))
            for place, width in enumerate(shape)
        )

    def _dim(
        self,
        dim: Sequence[Any],
        *,
        single: bool,
        keys: Sequence[tuple[str, int]] | None = None,
        layers: int | None = -1,
    ) -> Dim:
        reads, segments = dim
        first = segments[0][1][0][1][0]
        if first[0] == "stored":  # a grid of patches: as the file has it, nothing grows there
            shape = self.read.shape(first[1], layers)
            if shape is None and "{layer}" in first[1]:
                return Dim(untold(first[1]))
            return Dim(fixed(shape[first[2]] if shape else 1))
        layout = layout_of(segments, single=single)
        return Dim(layout, consumes=reads == 1, normed=reads == 2, keys=tuple(keys or ()))


def _in_mask(mask: str, field: str, tensor: str) -> Callable[[Sizes, int], bool]:
    def has(sizes: Sizes, layer: int) -> bool:
        if mask not in sizes:
            raise UsageError(
                f"config.json does not say which layers have {tensor}"
                + (f": {field} is missing." if field else "."),
                "Give the folder with its weights, or let transformers write the config anew: "
                "AutoConfig.from_pretrained(FOLDER).save_pretrained(FOLDER).",
            )
        return bool(sizes[mask] >> layer & 1)

    return has
