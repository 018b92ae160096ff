"""The derived table of a class: what was found on a twin, put into the words of a family."""

from __future__ import annotations

import datetime
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from growkit.derive.attention_cost import attention_cost
from growkit.derive.axis_words import AxisWords, kind_of, path_name
from growkit.derive.builder import Builder, as_held
from growkit.derive.config_values import (
    default_lists,
    defaults,
    flags_of,
    implied,
    older_names,
    spellings,
)
from growkit.derive.dimension_words import Unspeakable
from growkit.derive.studied import Findings
from growkit.derive.tensor_words import TensorWords
from growkit.families.derived.form import FORMAT, INNER
from growkit.families.layer_fields import leaf, with_values


def make_table(builder: Builder, config: Any, found: Findings) -> dict[str, Any]:
    """The table, its operators not proven yet."""
    import transformers

    place = found.layers.place
    inner = leaf(found.values, place)
    kind = kind_of(found.model.model)
    words, said, tensors = _in_words(found)
    attention = attention_cost(words)  # before words.numbers is read: sizes note numbers there
    layers = found.layers
    counts = found.closings.counts | dict.fromkeys(layers.mates, "leading")
    flags, kinds = flags_of(inner, found)
    ignored = getattr(found.model.model, "_keys_to_ignore_on_load_unexpected", ())
    table: dict[str, Any] = {
        "format": FORMAT,
        "model_type": builder.model_type,
        "class": type(found.model.model).__name__,
        "transformers": transformers.__version__,
        "source": class_hash(found.model.model),
        "date": datetime.date.today().isoformat(),
        "place": list(place),
        "flags": flags,
        "kinds": kinds,
        "defaults": defaults(builder, config, place, words, found),
        "implied": implied(builder, found, words),
        "layers": {
            "field": layers.field,
            "counts": counts,
            "period": found.closings.period,
            "lists": default_lists(builder, place, inner),
            "other": sorted(layers.other),
            **({"sections": list(layers.sections)} if layers.sections else {}),
        },
        "axes": words.axes,
        "numbers": sorted(words.numbers),
        "tied": words.ties(),
        "tensors": tensors,
        "patterns": said.patterns,
        "whole": words.whole,
        "cost": attention,
        "operators": {},
        "carried": said.carried,
        "projected": said.projected(),
        "stream": stream_of(words),
        "fills": {
            axis: sorted(path_name(path, place) for path in times)
            for axis, times in found.fills.items()
        },
        "copied": sorted(ignored or ()),
    }
    if widths := rounded(words):
        table["rounded"] = widths
    if blocks := as_held(config)[1]:
        table["blocks"] = blocks
        kinds[blocks["list"]] = sorted({*kinds.get(blocks["list"], ()), *blocks["words"]})
    if found.closings.first:
        table["layers"]["first"] = found.closings.first
    if kind != "decoder":
        table["kind"] = kind
    if not place:
        table["spellings"] = spellings(builder.config_class, words)
    if older := older_names(builder, found, words):
        table["older"] = older
    prefix = f"{getattr(found.model.model, 'base_model_prefix', '')}."
    if not place and found.layers.second is None and layered_under(tensors, prefix):
        table["prefix"] = prefix
    if wants_whole_heads(builder, found):
        table["divides"] = type(builder.config(found.values)).__name__
    if layers.second is not None and found.second is not None:
        table["second"] = {
            "field": path_name(layers.second.counter, place),
            "place": list(layers.second.place),
            "alone": layers.second.alone,
            "counts": found.second.counts,
            "first": found.second.first,
        }
        if layers.second.alone:  # as T5 has it: as many as the encoder's, where none are stated
            table["implied"].setdefault(layers.second.field, ["product", layers.field])
    if layers.field is None:
        table["layers"]["counted_by"] = next(
            name
            for name, value in inner.items()
            if isinstance(value, list) and len(value) == layers.count
        )
    return table


def layered_under(tensors: Sequence[Mapping[str, Any]], prefix: str) -> bool:
    """The names of all tensors of layers begin so: files without it are read by the class too."""
    layered = [entry["name"] for entry in tensors if "{layer}" in entry["name"]]
    return len(prefix) > 1 and all(name.startswith(prefix) for name in layered)


def wants_whole_heads(builder: Builder, found: Findings) -> bool:
    """The class refuses a hidden size that is no multiple of the query heads, though heads have a
    size of their own."""
    if found.stream is None or "query_head" not in found.paths or "query_head" in found.fills:
        return False
    hidden, heads = found.stream.path, found.paths["query_head"][0]
    size, count = (found.axes.fields[path] for path in (hidden, heads))
    odd = size + (count // 2 or 1)
    accepted = []
    for tried in (odd, size + 2 * count) if odd % count else ():
        try:
            builder.shapes(with_values(found.values, {hidden: tried}))
            accepted.append(True)
        except Exception:  # its refusal
            accepted.append(False)
    return accepted == [False, True]


def _in_words(found: Findings) -> tuple[AxisWords, TensorWords, list[dict[str, Any]]]:
    """The tensors in words; an axis for which there are none does not grow, the others do."""
    while True:
        words = AxisWords(found)
        said = TensorWords(words)
        try:
            return words, said, said.tensors()
        except Unspeakable as error:
            if not error.axes:
                raise
            found.drop(error.axes, error.cause)


def stream_of(words: AxisWords) -> dict[str, Any]:
    """What growth of the hidden size has to know."""
    stream = words.found.stream
    if stream is None:
        return {}
    gains = {words.found.axes.roles[place].name for place in stream.gains}
    inside = [
        role.name
        for role in words.found.axes.roles
        if len(role.shape) == 1 and "norm" in role.name and role.name.endswith("weight")
    ]
    field, eps = stream.eps or (None, 0.0)
    if INNER in words.found.fills:
        return {"sqrt_embedding": False, "norm": {"why": "heads inside its blocks grow along"}}
    norm: dict[str, Any] = {"why": stream.no_padding}
    if not stream.no_padding:
        norm = {"eps_field": field, "eps": eps, "centred": stream.centred}
        if not gains.issuperset(inside):
            norm["shared"] = "norms inside its blocks"
    return {"sqrt_embedding": False, "norm": norm}


def rounded(words: AxisWords) -> dict[str, Any]:
    """The flag with which the class takes widths as they stand, and for every axis of such a
    width the tensor and dimension that has it and the elements of a unit."""
    widths = {
        axis: path for axis, (path, *_) in words.found.paths.items() if path in words.found.rounded
    }
    if not widths:
        return {}
    stored: dict[str, list[Any]] = {}
    for axis, path in widths.items():
        for number, dim in sorted(words.found.widths[axis].readers):
            role = words.found.axes.roles[number]
            block = (role.sizes[dim] or {}).get((path,))
            if block and len(role.sizes[dim] or {}) == 1:
                stored[axis] = [role.name, dim, block]
    flag = next(path for path, value in words.found.rounded.items() if isinstance(value, bool))
    name = path_name(flag, words.place)
    return {"flag": name, "exact": leaf(words.found.values, flag), "stored": stored}


def class_hash(model: Any) -> str:
    """Hash of the source files that a model class and its config class stand in."""
    digest = hashlib.sha256()
    modules = {type(model).__module__, type(model.config).__module__}
    for name in sorted(modules):
        path = getattr(sys.modules.get(name), "__file__", None)
        digest.update(FilePath(path).read_bytes() if path else name.encode())
    return digest.hexdigest()[:16]
