"""Layers of several kinds in a fixed order: five with a window and one without, every fourth
without RoPE. The class makes the order of the depth; an engine may know no other.

A layer's kind is what the config's lists of layers say of it. Identity layers compute nothing, so
they may be of any kind: a placement keeps the order of the class when every old layer lands where
the class puts a layer of its kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from growkit.core.engines import fixed_pattern_note
from growkit.families import Family
from growkit.families.base import every_layer
from growkit.surgery.effect import LayerMap, LayerSource, ModelShape

Kind = tuple[Any, ...]


def rule_lists(family: Family, config: Mapping[str, Any], layers: int) -> dict[str, list[Any]]:
    """The lists of layer kinds that the class would make for this depth without any in the config.

    Empty where the class has layers of one kind.
    """
    bare = {name: value for name, value in config.items() if name not in family.layer_rules}
    return {name: rule(bare, layers) for name, rule in family.layer_rules.items()}


def rule_kinds(family: Family, config: Mapping[str, Any], layers: int) -> list[Kind]:
    """The same, as the kind of every layer."""
    return list(zip(*rule_lists(family, config, layers).values(), strict=True))


def stated_kinds(family: Family, config: Mapping[str, Any], layers: int) -> list[Kind]:
    """The kind of every layer of a model."""
    return list(zip(*_lists(family, config, layers).values(), strict=True))


def _lists(family: Family, config: Mapping[str, Any], layers: int) -> dict[str, list[Any]]:
    return {name: family.layer_list(config, name, layers) or [] for name in family.layer_rules}


def moved_counts(
    family: Family, config: Mapping[str, Any], old: int, sources: Sequence[int]
) -> dict[str, int]:
    """Config fields that count leading layers, after the layers have moved."""
    counts = {}
    for name in family.layer_counts:
        counted = config.get(name)
        if isinstance(counted, int):
            below = [source < counted for source in sources]
            if counted >= old:
                counts[name] = max(counted, len(sources))
            elif below == sorted(below, reverse=True):
                counts[name] = sum(below)
    return counts


def follows_rule(shape: ModelShape, layers: LayerMap) -> bool:
    """The class would give every layer the kind of the layer that it is made of."""
    old = shape.sizes["layer"]
    kinds = stated_kinds(shape.family, shape.config, old)
    sources = [layer.source for layer in layers]
    config = {**shape.config, **moved_counts(shape.family, shape.config, old, sources)}
    rule = rule_kinds(shape.family, config, len(layers))
    return not rule or [kinds[source] for source in sources] == rule


def pattern_positions(
    kinds: Sequence[Kind], rule: Sequence[Kind], wanted: Sequence[int]
) -> list[int] | None:
    """Increasing positions at which layers of these kinds follow the rule; None: there are none.

    The first layer stays the first. Every other one lands at or behind its ``wanted`` position
    where the layers after it still find places, else as late as they allow.
    """
    latest, position = [0] * len(kinds), len(rule)
    for layer in range(len(kinds) - 1, -1, -1):
        position -= 1
        while position >= 0 and rule[position] != kinds[layer]:
            position -= 1
        latest[layer] = position
    if position < 0 or rule[0] != kinds[0]:
        return None
    positions = [0]
    for layer in range(1, len(kinds)):
        position = max(positions[-1] + 1, wanted[layer])
        while position < latest[layer] and rule[position] != kinds[layer]:
            position += 1
        positions.append(min(position, latest[layer]))
    return positions


def pattern_layers(shape: ModelShape, even: LayerMap) -> LayerMap | None:
    """Identity layers so placed that the class's own order continues, as evenly as it allows.

    Each is a copy of the nearest layer of its own kind before it, else of the first after it; of a
    kind that the source has not, of the layer before it (the tensors are the same).

    Args:
        even: the placement without regard to kinds.

    Returns:
        None when the class has no order, or no placement keeps it.
    """
    old, target = shape.sizes["layer"], len(even)
    kinds = stated_kinds(shape.family, shape.config, old)
    rule = rule_kinds(shape.family, shape.config, target)
    if not rule:
        return None
    wanted = [position for position, layer in enumerate(even) if layer.kind == "kept"]
    positions = pattern_positions(kinds, rule, wanted)
    if positions is None or any(t.layers is not every_layer for t in shape.family.tensors):
        return None
    first = {kind: kinds.index(kind) for kind in set(kinds)}
    kept = dict(zip(positions, range(old), strict=True))
    last: dict[Kind, int] = {}
    before, result = 0, []
    for position, kind in enumerate(rule):
        if position in kept:
            before = last[kind] = kept[position]
            result.append(LayerSource(before, "kept"))
        else:
            donor = last.get(kind, first.get(kind, before))
            result.append(LayerSource(donor, "identity"))
    return tuple(result)


def pattern_notes(shape: ModelShape, layers: LayerMap) -> tuple[str, ...]:
    """What a depth that leaves the class's order means; nothing where it continues."""
    family, old = shape.family, shape.sizes["layer"]
    if family.layer_rules and follows_rule(shape, layers):
        return ()
    rules = rule_lists(family, shape.config, len(layers))
    engine = fixed_pattern_note(shape.config.get("model_type"))
    notes = []
    for name in ("layer_types", "no_rope_layers"):
        values = family.layer_list(shape.config, name, old)
        mapped = [values[layer.source] for layer in layers] if values else []
        if len(set(mapped) | set(rules.get(name, ()))) < 2 or mapped == rules.get(name):
            continue
        counts = ", ".join(f"{count} {kind}" for kind, count in Counter(map(str, mapped)).items())
        notes.append(
            f"layers alternate: a new layer is of the kind of the layer that it copies, and "
            f"{name} in config.json lists them ({counts}); software that assumes a regular pattern "
            f"instead of reading that list would compute another function{engine}"
        )
    return tuple(notes)
