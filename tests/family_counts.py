"""Counts of a config by its family's table: what plans and ``inspect`` say of a model."""

from __future__ import annotations

from math import prod
from typing import Any

from growkit.families import family_of


def parameters(config: Any, part: str = "") -> int:
    """Parameters of the tensors that have ``part`` in their name."""
    fields = config.to_dict()
    family = family_of(fields)
    shapes = dict(family.declared(family.sizes(fields)))
    return sum(prod(shape) for name, shape in shapes.items() if part in name)


def kv_elements(config: Any) -> int:
    """Cached elements per token of one cache of a layer."""
    fields = config.to_dict()
    family = family_of(fields)
    return family.kv_elements(family.sizes(fields))
