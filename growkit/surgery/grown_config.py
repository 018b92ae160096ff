"""config.json of the grown model: only what growth changed is changed, unknown fields stay; and
what transformers and engines make of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import Any

from growkit.core.engines import derived_head_dim
from growkit.core.errors import GrowkitError, UsageError
from growkit.families import Family
from growkit.families.base import Config
from growkit.families.layer_fields import leaf, with_values
from growkit.families.stored_parts import moved_quantisation
from growkit.families.upcycling import UPCYCLINGS
from growkit.surgery.effect import NO_LAYER, Effect, LayerMap
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
    if "vocab" in growth.axes and not family.origin:  # a derived table says where it stands
        grown["vocab_size"] = growth.sizes["vocab"]
    grown.update(growth.fields)
    if growth.layers_moved:
        _map_layers(grown, family, source_sizes["layer"], growth.layers, growth.kinds_by_rule)
        prefix = next((t.name.split("{layer}")[0] for t in family.tensors if t.per_layer), "")
        sources = [layer.source for layer in growth.layers]
        grown.update(moved_quantisation(grown, prefix, sources))
    if family.map_layers is not None:
        for stack in (s.axis for s in family.stacks[1:] if s.axis in growth.stacks):
            made_of = [layer.source for layer in growth.stacks[stack]]
            grown.update(family.map_layers(grown, made_of, stack))
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
    grown: dict[str, Any], family: Family, old: int, layers: LayerMap, by_rule: bool
) -> None:
    """Every written layer keeps the entries of the layer that it is made of; with ``by_rule`` its
    kind is the one that the class gives to its index. One from scratch has those of a fresh model.

    A list that config.json left to the class is written out where the class would now make
    another one, or where layers differ (readers other than transformers have rules of their own).
    """
    sources = [layer.source for layer in layers]
    if family.map_layers is not None:
        grown.update(family.map_layers(grown, sources, "layer"))
        if by_rule:
            lists = rule_lists(family, grown, len(sources))
            stated = {(*family.layers_at, name): values for name, values in lists.items()}
            kept = {p: v for p, v in stated.items() if leaf(grown, p) or any(e != v[0] for e in v)}
            grown.update(with_values(grown, kept))
        return
    before = {name: family.layer_list(grown, name, old) for name in family.per_layer_fields}
    if not old:  # lists without an entry say nothing of the layers to come
        for name in before:
            grown.pop(name, None)
    grown.update(moved_counts(family, grown, old, sources))
    rules = rule_lists(family, grown, len(sources)) if by_rule else {}
    fresh = {name: rule(grown, len(sources)) for name, rule in family.fresh_entries.items()}
    for name, values in before.items():
        if values is None:
            continue
        if len(values) != old:
            raise UsageError(
                f"config.json has {len(values)} entries in {name} for {old} layers.",
                f"Write one entry a layer into {name}.",
            )
        if name in rules:
            mapped = rules[name]
        elif name in fresh:
            mapped = [
                fresh[name][place] if layer.from_scratch else values[layer.source]
                for place, layer in enumerate(layers)
            ]
        elif NO_LAYER in sources:
            continue  # the class makes it
        else:
            mapped = [values[source] for source in sources]
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


# -- what engines and transformers make of it ------------------------------------------------------


def head_dim_note(
    config: Mapping[str, Any], before: Mapping[str, int], growth: Effect
) -> tuple[str, ...]:
    """Engines that would read other heads out of the written config, and the way round them."""
    sizes = growth.sizes
    if not {"query_head", "head_dim", "hidden"} <= sizes.keys():
        return ()
    hidden, heads, head_dim = sizes["hidden"], sizes["query_head"], sizes["head_dim"]
    engines = derived_head_dim(config.get("model_type"), hidden, heads, head_dim)
    if not engines:
        return ()
    combination = ""
    if not growth.converts and before["query_head"] * before["head_dim"] == before["hidden"]:
        factor = max(Fraction(sizes[axis], before[axis]) for axis in ("hidden", "query_head"))
        by = f"x{factor}" if factor.denominator == 1 else f"x{float(factor):g}"
        combination = f". --hidden {by} --heads {by} together load everywhere"
    return (
        f"head_dim = {head_dim} is not hidden_size / heads = {hidden} / {heads}: "
        f"{engines}{combination}",
    )


MOST = 4


def sizes_that_load(
    family: Family, config: Config, sizes: Mapping[str, int], grown: Collection[str]
) -> str:
    """One sentence with query head counts and hidden sizes near ``sizes`` that are not refused.

    Args:
        family: of the written checkpoint.
        config: of the source.
        sizes: the refused sizes.
        grown: axes that the request grew.
    """
    choices = []
    if "query_head" in grown:
        step = sizes["query_head"] // sizes["kv_head"] if "kv_head" in grown else sizes["kv_head"]
        counts = _accepted(family, config, sizes, "query_head", step)
        if counts:
            choices.append(f"query heads that fit: {counts}")
    hidden = _accepted(family, config, sizes, "hidden", 1, sizes["hidden"] + 1)
    if hidden:
        choices.append(f"or with --hidden {hidden}" if choices else f"with --hidden {hidden}")
    if "hidden" in grown and "query_head" in sizes and "query_head" not in grown:
        heads, odd = divmod(sizes["query_head"] * sizes["hidden"], family.sizes(config)["hidden"])
        if not odd and not family.refusal(config, {**sizes, "query_head": heads}):
            choices.append(f"with --query-heads {heads} beside the hidden size")
    if not choices and "hidden" in grown and "query_head" in sizes:
        choices = _heads_that_fit(family, config, sizes)
    if not choices:
        return "Choose another size or grow another axis too."
    text = ", ".join(choices)
    return f"{text[0].upper()}{text[1:]}."


def _accepted(
    family: Family,
    config: Config,
    sizes: Mapping[str, int],
    axis: str,
    step: int,
    first: int | None = None,
) -> str:
    """Multiples of ``step`` up to four times the refused size that the family accepts.

    They begin at ``first``, by default above the source's size.
    """
    first = first or family.sizes(config)[axis] + step
    accepted = [
        size
        for size in range(first - first % step, 4 * sizes[axis] + 1, step)
        if family.refusal(config, {**sizes, axis: size}) is None
    ]
    return ", ".join(str(size) for size in accepted[:MOST])


def _heads_that_fit(family: Family, config: Config, sizes: Mapping[str, int]) -> list[str]:
    """Numbers and sizes of heads that go with a hidden size, for classes that tie them together."""
    width = sizes["query_head"] // sizes["kv_head"]
    counts = [
        str(heads)
        for heads in range(sizes["query_head"] + width, 4 * sizes["query_head"] + 1, width)
        if not family.refusal(config, {**sizes, "query_head": heads, "kv_head": heads // width})
    ]
    dims = [
        str(dim)
        for dim in range(sizes["head_dim"] + 1, 4 * sizes["head_dim"] + 1)
        if not family.head_dim.refusal
        and not family.refusal(config, {**sizes, "head_dim": dim, "value_dim": dim})
    ]
    options = (("--heads", counts[:MOST]), ("--head-dim", dims[:MOST]))
    texts = [f"with {option} {', '.join(found)}" for option, found in options if found]
    return [f"or {text}" if place else text for place, text in enumerate(texts)]
