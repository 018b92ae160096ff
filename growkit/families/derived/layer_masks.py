"""Which layers have a tensor, as bits: bit 0 is the first layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from growkit.families.derived.form import is_word


def mask_of(
    rule: Sequence[Any] | None, config: Mapping[str, Any], lists: Mapping[str, Any], layers: int
) -> int | None:
    """Bits of the layers that a rule picks; None where it cannot say."""
    if rule is None:
        return None
    kind, *rest = rule
    if kind == "list":
        name, words = rest
        values = config.get(name)
        if not isinstance(values, list):
            period = lists.get(name)
            if not period:
                return None
            values = [period[layer % len(period)] for layer in range(layers)]
        if len(values) < layers:
            return None
        picked = [is_word(value, words) for value in values[:layers]]
    elif kind in ("index", "not index"):
        values = config.get(rest[0]) or []
        picked = [(layer in values) == (kind == "index") for layer in range(layers)]
    elif kind in ("first", "rest"):
        picked = [(layer < rest[0]) == (kind == "first") for layer in range(layers)]
    elif kind in ("below", "from"):
        edge = config.get(rest[0])
        if not isinstance(edge, int):
            return None
        picked = [(layer < edge) == (kind == "below") for layer in range(layers)]
    else:
        period, places = rest
        picked = [layer % period in places for layer in range(layers)]
    return sum(1 << layer for layer, has in enumerate(picked) if has)
