"""What a family says about the size of its heads: whether it can grow, and what goes with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, nextafter
from typing import Any

Config = Mapping[str, Any]

ROTARY = (
    "rotary position encoding derives its frequencies and its pairs of channels from head_dim, so "
    "no choice of weights keeps the function"
)
HEAD_NORM = "the norms of query and key heads run over all channels of a head"
OUTPUT_NORM = "the norm of each head's output runs over all of its channels"


@dataclass(frozen=True)
class PartialRotary:
    """Rotation of the first channels of a head: int(head_dim x factor) of them.

    Attributes:
        field: config field of the factor beside ``rope_parameters``.
        default: the factor where the config is silent.
        place: of the part of the config that has them.
    """

    field: str
    default: float
    place: tuple[str, ...] = ()

    def rotated(self, config: Config, head_dim: int) -> int:
        """Channels of a head that are rotated."""
        for part in self.place:
            config = config[part]
        factor = _rope(config)[1].get("partial_rotary_factor", config.get(self.field, self.default))
        return int(head_dim * factor)

    def rewritten(self, config: Config, head_dim: int, rotated: int) -> dict[str, Any]:
        """Fields of the part with which heads of ``head_dim`` channels rotate ``rotated`` of them.

        Args:
            config: that part.
        """
        factor = rotated / head_dim
        if int(head_dim * factor) != rotated:
            factor = nextafter(factor, inf)
        name, rope = _rope(config)
        if "partial_rotary_factor" not in rope:
            return {self.field: factor}
        outer = {self.field: factor} if self.field in config else {}
        return {name: {**rope, "partial_rotary_factor": factor}, **outer}


def _rope(config: Config) -> tuple[str, Mapping[str, Any]]:
    """Name and content of the config's rotary parameters."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return name, config.get(name) or {}


@dataclass(frozen=True)
class HeadDimRule:
    """Whether head_dim can grow.

    Attributes:
        refusal: why it cannot, or empty.
        scaled: whether the softmax scale of this config is derived from head_dim.
        rotary: partial rotary encoding; None without rotation.
        along: other sizes that are the same number.
    """

    refusal: str = ""
    scaled: Callable[[Config], bool] = lambda config: True
    rotary: PartialRotary | None = None
    along: tuple[str, ...] = ("value_dim",)


PLAIN_ROTARY = HeadDimRule(ROTARY)
