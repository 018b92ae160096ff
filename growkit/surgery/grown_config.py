"""config.json of the grown model: only what growth changed is changed, unknown fields stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from growkit.core.errors import GrowkitError, UsageError
from growkit.families import Family
from growkit.families.upcycling import UPCYCLINGS
from growkit.surgery.effect import Effect
from growkit.surgery.layer_pattern import moved_counts, rule_lists


def grown_config(
    config: Mapping[str, Any],
    source_family: Family,
    family: Family,
    source_sizes: Mapping[str, int],
    growth: Effect,
) -> dict[str, Any]:
    """The config of the grown model, in the key order of the source."""
    if family is not source_family:
        grown = _converted(config, source_family, family, source_sizes)
    else:
        grown = dict(config)
    before = family.config_fields({**growth.sizes, **source_sizes})
    after = family.config_fields(growth.sizes)
    for field, value in after.items():
        other = family.spellings.get(field)
        if other in grown:
            grown[other] = value
            if field not in grown:
                continue
        stated = value is not None and field in grown
        if value != before.get(field) or (stated and grown[field] != value):
            grown[field] = value
    heads_grow = any(axis.endswith("_head") for axis in growth.axes)
    if "head_dim" in after and (heads_grow or "hidden" in growth.axes):
        # From here on hidden_size / num_attention_heads is no longer the head_dim.
        grown["head_dim"] = growth.sizes["head_dim"]
    grown.update(growth.fields)
    if growth.layers_moved:
        sources = [layer.source for layer in growth.layers]
        _map_layers(grown, family, source_sizes["layer"], sources, growth.kinds_by_rule)
    if not _reads_back(grown, family, growth):
        # A field that the source left to a default now has to be stated.
        grown.update(after)
        if not _reads_back(grown, family, growth):
            raise GrowkitError(
                f"The {family.name} config cannot state the grown sizes {growth.sizes}.",
                "Please report this: growkit would have written a config that loads wrongly.",
            )
    return grown


def _converted(
    config: Mapping[str, Any], source: Family, family: Family, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """The source's config in the words of another family."""
    if family.adopt is not None:
        return family.adopt(config, source, sizes)
    return UPCYCLINGS[source.name].config(config)


def _map_layers(
    grown: dict[str, Any], family: Family, old: int, sources: Sequence[int], by_rule: bool
) -> None:
    """Every written layer keeps the entries of the layer that it is made of; with ``by_rule`` its
    kind is the one that the class gives to its index.

    A list that config.json left to the class is written out where the class would now make
    another one, or where layers differ (readers other than transformers have rules of their own).
    """
    before = {name: family.layer_list(grown, name, old) for name in family.per_layer_fields}
    grown.update(moved_counts(family, grown, old, sources))
    rules = rule_lists(family, grown, len(sources)) if by_rule else {}
    for name, values in before.items():
        if values is None:
            continue
        if len(values) != old:
            raise UsageError(
                f"config.json has {len(values)} entries in {name} for {old} layers.",
                f"Write one entry a layer into {name}.",
            )
        mapped = [values[source] for source in sources]
        mapped = rules.get(name, mapped)
        implied = None if grown.get(name) else family.layer_list(grown, name, len(sources))
        if mapped != implied or len(set(mapped)) > 1:
            grown[name] = mapped


def _reads_back(config: Mapping[str, Any], family: Family, growth: Effect) -> bool:
    """The written config means the sizes that were planned."""
    # What names tell (tied, fused experts) one name of each kind tells.
    written = {tensor.name for tensor in family.present(growth.sizes)}
    try:
        sizes = family.sizes_of(config, written)
    except UsageError:
        return False
    return all(growth.sizes[axis] == size for axis, size in sizes.items())
