"""What attention costs: elements of a cache, and the width of all heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from growkit.derive.axes import HEADS, HIDDEN, KV_HEADS, PER, Polynomial, evaluate
from growkit.derive.axis_words import AxisWords
from growkit.derive.builder import Builder, Path, integers, token_ids
from growkit.derive.widths import Width
from growkit.families.layer_fields import leaf, with_values
from growkit.verification.model_inputs import arguments, cache_keyword

_HEAD_DIM = re.compile(r"head_dim|d_kv")


def attention_cost(words: AxisWords) -> dict[str, Any]:
    """What attention costs: elements of a cache a layer and token, and width of the heads."""
    found = words.found
    attended: list[list[Any]] = [[0]]
    cached: list[list[Any]] = [[0]]
    width = found.widths.get("query_head")
    if width is not None:
        readers = sorted(width.readers, key=lambda key: len(found.axes.roles[key[0]].layers))
        for place, dim in readers[:1]:
            attended = words.size(found.axes.roles[place].sizes[dim] or {})
        kv = found.paths.get("kv_head", [None])[0]
        seen = set()
        for place, dim in sorted(width.labels):
            size = found.axes.roles[place].sizes[dim] or {}
            matrix = len(found.axes.roles[place].shape) == 2
            terms = {key: value for key, value in size.items() if kv in key}
            if kv and terms and matrix and found.axes.roles[place].name not in seen:
                seen.add(found.axes.roles[place].name)
                cached = [*cached, *words.size(terms)]
        if not kv and (left := _key_values(words, width)):
            cached = left
        elif not kv:
            cached = [[2 * product[0], *product[1:]] for product in attended]
    elif (kept := _kept_by_a_cache(words)) is not None:
        cached = words.size(kept)
        attended = words.size(_of_all_heads(words, kept))
    return {"attended": attended, "kv_elements": cached}


def _key_values(words: AxisWords, width: Width) -> list[list[Any]]:
    """Sizes of key/value heads that all query heads share, where there are such."""
    path = words.found.paths["query_head"][0]
    for number, dim in sorted(width.labels):
        size = words.size_of(number, dim) or {}
        left = {key: value for key, value in size.items() if path not in key}
        if left and len(left) < len(size):
            return words.size(left)
    return []


def _kept_by_a_cache(words: AxisWords) -> Polynomial | None:
    """Elements of a cache a layer and token where no axis of heads was found: as measured, in
    the fields that change it."""
    builder, stack = words.found.model.builder, words.found.layers.second or words.found.layers
    if words.kind == "encoder" or not (base := cached_elements(builder, words.values)):
        return None
    top: list[Path] = []
    below: list[Path] = []
    sizes = dict(integers(words.values))
    own = [p for p in sizes if p[:-1] == stack.place]
    for path in own:
        if any(p.fullmatch(path[-1]) for p in (HIDDEN, HEADS, KV_HEADS, _HEAD_DIM)):
            found = cached_elements(builder, with_values(words.values, {path: 2 * sizes[path]}))
            if found in (2 * base, base // 2):
                (top if found == 2 * base else below).append(path)
    wide = [path for path in own if HIDDEN.fullmatch(path[-1])]
    heads = [path for path in own if HEADS.fullmatch(path[-1])]
    kept = base // max(1, evaluate({tuple(top): 1}, sizes))
    told = below or any(_HEAD_DIM.fullmatch(path[-1]) for path in top)
    # A class that refuses another width of heads: it is that of all over their number.
    whole = wide and heads and kept % (sizes[wide[0]] // sizes[heads[0]]) == 0
    if whole and not told and wide[0] not in top:
        top, below = [*top, wide[0]], [heads[0]]
    key = (*sorted(top), *((PER, *path) for path in sorted(below)))
    one = evaluate({key: 1}, sizes)
    return {key: base // one} if one and base % one == 0 else None


def _of_all_heads(words: AxisWords, kept: Polynomial) -> Polynomial:
    """Width of the query heads, from the elements that a cache keeps of key/value heads."""
    result: Polynomial = {}
    for key, value in kept.items():
        paths = [path for path in key if path[0] != PER]
        for number, path in enumerate(paths):
            if KV_HEADS.fullmatch(path[-1]):
                near = leaf(words.values, path[:-1])
                heads = next((n for n in near if HEADS.fullmatch(n)), path[-1])
                paths[number] = (*path[:-1], heads)
        paths += [path for path in key if path[0] == PER]
        result[tuple(paths)] = value // 2
    return result


def cached_elements(builder: Builder, values: Mapping[str, Any]) -> int | None:
    """Elements that a cache keeps of a token in the first layer that has one, as a forward pass
    fills it; None where the class keeps none."""
    try:
        model = builder.build(values)
        given = {**arguments(model, token_ids(model)), "use_cache": True}
        with torch.no_grad():
            result = model(**given)
        cache: Any = getattr(result, cache_keyword(model), None)
        layers = getattr(cache, "self_attention_cache", cache).layers
        kept = next(layer for layer in layers if getattr(layer, "keys", None) is not None)
        read = given["decoder_input_ids"] if "decoder_input_ids" in given else given["input_ids"]
        length = read.shape[1]
        parts = (kept.keys, kept.values)
        if any(part.shape[-2] != length for part in parts):
            return None
        return sum(part[0].numel() for part in parts) // length
    except Exception:  # a class without a cache, or with one of its own kind
        return None
