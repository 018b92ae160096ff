"""Values of a config: those that a table holds for, and what a class puts for missing ones."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from growkit.derive.axes import HEADS, KV_HEADS, PER, WIDTHS
from growkit.derive.axis_words import AxisWords, path_name
from growkit.derive.builder import Builder, Path, as_held, integers
from growkit.derive.layer_stacks import find_layers
from growkit.derive.studied import TIES, Findings
from growkit.families.derived.form import GROUPS, IDLE, of_every_layer
from growkit.families.layer_fields import factor_fields, leaf, with_values


def flags_of(inner: Mapping[str, Any], found: Findings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values that the table holds for, and words that lists may hold."""
    flags: dict[str, Any] = {}
    for name, value in inner.items():
        if name in IDLE or "dropout" in name or name.startswith("_"):
            continue
        if isinstance(value, bool | str):
            flags[name] = value
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            flags[f"{name}.rope_type"] = value.get("rope_type")
    place = found.layers.place
    for path in found.axes.structural:
        name = path_name(path, place)
        if name == "embedding_size":  # of importance is whether it is the hidden size
            same = inner.get(name) == inner.get("hidden_size")
            flags[name] = ["same" if same else "unlike", "hidden_size"]
        elif name not in found.closings.counts:
            flags[name] = leaf(found.values, path)
    kinds = {
        name: sorted(set(map(str, value)))
        for name, value in inner.items()
        if isinstance(value, list)
        and len(value) == found.layers.count
        and all(isinstance(entry, str) for entry in value)
    }
    return flags, kinds


def defaults(
    builder: Builder, config: Any, place: Path, words: AxisWords, found: Findings
) -> dict[str, Any]:
    """What the class puts for fields that a config need not state."""
    try:
        plain, _ = as_held(builder.config_class())
    except Exception:  # a class without defaults
        return {}
    inner = leaf(plain, place)
    if not isinstance(inner, Mapping):
        return {}
    used = {name for names in words.axes.values() for name in names} | words.numbers
    layers = found.layers
    used |= {layers.field or "", *found.closings.counts, *layers.mates, *layers.sections}
    used.add(TIES)
    used |= {name.partition(PER)[0] for name in used}
    used |= {part for name in used for part in factor_fields(name) or ()}
    flags, _ = flags_of(leaf(found.values, place), found)
    used |= {*flags, *GROUPS}
    kept = {}
    for name in sorted(used):
        of_whole = name.startswith("^")
        value = leaf(plain if of_whole else inner, tuple(name.removeprefix("^").split(".")))
        value = value if name in found.closings.counts else of_every_layer(value)
        factor = isinstance(value, float) and WIDTHS.fullmatch(name)
        if isinstance(value, bool | int | str) or factor or name in found.closings.counts:
            kept[name] = value
    if place and isinstance(plain.get("tie_word_embeddings"), bool):
        kept["^tie_word_embeddings"] = plain["tie_word_embeddings"]
    return kept


def implied(builder: Builder, found: Findings, words: AxisWords) -> dict[str, Any]:
    """Fields that the class computes from others where they are null: found by leaving them out."""
    place = found.layers.place
    result: dict[str, Any] = {}
    counted = [n for names in words.axes.values() for n in names if not factor_fields(n)]
    paths = {(*place, *name.split(".")) for name in counted}
    paths |= {(*place, *name.split(".")) for name in words.numbers}
    numbers = {p: v for p, v in integers(found.values) if p[: len(place)] == place}
    for path in sorted(paths):
        if path not in numbers:
            continue
        shapes = None
        for bare in (with_values(found.values, {path: None}), _without(found.values, path)):
            try:
                shapes = builder.shapes(bare)
            except Exception:  # it has to be stated
                continue
            break
        if shapes is None:
            continue
        for rule in _rules(path, numbers):
            kind, *names = rule
            parts = [n if isinstance(n, int) else numbers[n] for n in names]
            value = parts[0] // parts[1] if kind == "quotient" else int(np.prod(parts))
            try:
                same = builder.shapes(with_values(found.values, {path: value})) == shapes
                distinct = value == numbers[path] or same
            except Exception:
                continue
            if same and distinct:
                result[path_name(path, place)] = [
                    kind,
                    *(n if isinstance(n, int) else path_name(n, place) for n in names),
                ]
                break
    return result


def _without(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A config that is silent about a field."""
    result = with_values(values, {})
    leaf(result, path[:-1]).pop(path[-1], None)
    return result


def _rules(path: Path, numbers: Mapping[Path, int]) -> list[tuple[Any, ...]]:
    """What a class may make of a number that is not there."""
    parent = path[:-1]
    hidden = [
        p for p in numbers if p[-1] in ("hidden_size", "d_model", "n_embd") and p[:-1] == parent
    ]
    heads = [p for p in numbers if HEADS.fullmatch(p[-1]) and p[:-1] == parent]
    if KV_HEADS.fullmatch(path[-1]):
        return [("product", h) for h in heads] + [("product", 1)]
    if "head_dim" in path[-1] or path[-1] == "kv_channels":
        return [("quotient", h, n) for h in hidden for n in heads]
    if WIDTHS.fullmatch(path[-1]):
        return [("product", factor, h) for h in hidden for factor in (4, 2, 3, 1)]
    return []


def default_lists(builder: Builder, place: Path, inner: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Lists of layer kinds that the class makes where a config has none, as one period."""
    result: dict[str, list[Any]] = {}
    try:
        plain, _ = as_held(builder.config_class())
    except Exception:  # a class without defaults
        return result
    layers = find_layers(builder, plain)
    whole = leaf(plain, place)
    if not isinstance(whole, Mapping):
        return result
    for name, value in whole.items():
        if isinstance(inner.get(name, 0), int) or not isinstance(value, list):
            continue
        if len(value) == layers.count:
            for period in range(1, min(16, len(value)) + 1):
                if all(value[i] == value[i % period] for i in range(len(value))):
                    result[name] = value[:period]
                    break
    return result


def spellings(config_class: Any, words: AxisWords) -> dict[str, str]:
    """Fields that the config class reads under a second name too (``num_experts``)."""
    named = {name for names in words.axes.values() for name in names} | words.numbers
    other = getattr(config_class, "attribute_map", None) or {}
    result = {field: name for name, field in other.items() if field in named and name not in named}
    # A name that the class keeps under another one is written under that (mT5's head_dim: d_kv).
    return result | {name: other[name] for name in named if other.get(name, name) not in named}


def older_names(builder: Builder, found: Findings, words: AxisWords) -> dict[str, str]:
    """Fields whose older name the config class obeys first where config.json has it (LFM2's
    ``block_ff_dim``): read in its source, and tried."""
    named = {name for names in words.axes.values() for name in names} | words.numbers
    place = found.layers.place

    def part(values: Mapping[str, Any]) -> Any:
        config = builder.config(values)
        for name in place:
            config = getattr(config, name)
        return config

    try:
        source = inspect.getsource(type(part(found.values)))
    except (OSError, TypeError, AttributeError):
        return {}
    result = {}
    for older, field in re.findall(r"kwargs\.pop\(\s*\"(\w+)\", self\.(\w+)\)", source):
        value = leaf(found.values, (*place, field)) if field in named else None
        if isinstance(value, int):
            told = part(with_values(found.values, {(*place, older): 2 * value}))
            if getattr(told, field, None) == 2 * value:
                result[field] = older
    return result
