"""The fewest layers of a stack that have every kind of layer of a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from growkit.derive.builder import Builder, Path, Underivable, Values, integers
from growkit.derive.layer_stacks import Layers, layer_kinds
from growkit.families.layer_fields import leaf, move_entry, with_values

MOST_LAYERS = 12


def few_layers(
    builder: Builder, values: Values, layers: Layers, held: Collection[Path] = ()
) -> tuple[Values, Layers]:
    """The first layers that have every kind, at least two; fields of ``held`` stay as they are."""
    kinds = layer_kinds(builder.shapes(values), layers, values)
    if kinds is None:
        raise Underivable("The class has no list of as many layers as the config says.")
    wanted, needed = set(kinds), _shortest(kinds)
    entries = leaf(values, layers.place).items()
    unrelated = frozenset(
        name
        for name, value in entries
        if isinstance(value, list) and move_entry(value, layers.count, range(layers.count)) is None
    )
    if needed > 4:  # a count of leading layers of one kind, or a period, may be smaller
        for path, value in integers(values):
            if not 1 < value <= layers.count or path in (*_counters(layers), *held):
                continue
            for smaller in (1, 2):
                tried = with_values(values, {path: smaller})
                try:
                    other = layer_kinds(builder.shapes(tried), layers, tried)
                except Exception:
                    continue
                if other and set(other) == wanted and _shortest(other) < needed:
                    values, needed = tried, _shortest(other)
                    break
    if needed > 4 and (one_of_each := _one_of_each(builder, values, layers, kinds, unrelated)):
        return one_of_each
    whole: list[tuple[Values, Layers]] = []
    periods = sorted({v for _, v in integers(values) if needed + 6 < v <= MOST_LAYERS})
    for keep in [*range(max(2, needed), needed + 7), *periods]:
        if keep > layers.count:
            break
        short = layers.moved(values, range(keep))
        fewer = replace(layers, count=keep, other=unrelated)
        try:
            found = layer_kinds(builder.shapes(short), fewer, short)
        except Exception:
            continue
        if found and {kind[0] for kind in found} >= {kind[0] for kind in wanted}:
            whole.append((short, fewer))
            if len(set(found)) == 1 or _repeats(builder, short, fewer, found):
                return short, fewer
    if whole:
        return whole[0]
    if layers.count <= MOST_LAYERS:
        return values, layers
    raise Underivable(f"No small number of layers has every kind of layer of the {layers.count}.")


def _counters(layers: Layers) -> list[Path]:
    """Paths of the numbers of layers."""
    return [layers.counter, *([layers.second.counter] if layers.second else [])]


def _shortest(kinds: Sequence[Any]) -> int:
    """Layers of the shortest beginning with every kind."""
    return max(kinds.index(kind) for kind in set(kinds)) + 1


def _repeats(builder: Builder, values: Values, layers: Layers, kinds: Sequence[Any]) -> bool:
    """Twice as many layers are the same kinds twice: lists move along, or a whole period ends."""
    longer = layers.moved(values, [*range(layers.count)] * 2)
    doubled = replace(layers, count=2 * layers.count)
    try:
        found = layer_kinds(builder.shapes(longer), doubled, longer)
    except Exception:  # a refusal of the class
        return False
    return found is not None and [k[0] for k in found] == 2 * [k[0] for k in kinds]


def _one_of_each(
    builder: Builder,
    values: Values,
    layers: Layers,
    kinds: Sequence[Any],
    unrelated: frozenset[str],
) -> tuple[Values, Layers] | None:
    """The first layer of every kind alone, where the config can say so."""
    chosen = sorted({kinds.index(kind) for kind in kinds})
    if len(chosen) < 2:
        return None
    short = layers.moved(values, chosen)
    fewer = replace(layers, count=len(chosen), other=unrelated)
    try:
        found = layer_kinds(builder.shapes(short), fewer, short)
    except Exception:  # a refusal of the class
        return None
    alike = found is not None and [kind[0] for kind in found] == [kinds[i][0] for i in chosen]
    return (short, fewer) if alike and _repeats(builder, short, fewer, found or []) else None
