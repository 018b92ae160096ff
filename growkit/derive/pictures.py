"""A twin of a multimodal model that sees: its towers made small together, and what they write made
as wide as the small language model.

The fields of a wrapper's parts say some sizes twice (the width that a tower's last projection has,
and the hidden size of the language model; the side of a picture, and how many tokens it becomes).
Which fields have to go with which is found by trying: what the class computes features of the right
width with, and what its logits then change with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import torch

from growkit.derive.axes import HEADS, HIDDEN, KV_HEADS
from growkit.derive.twin import (
    Builder,
    Layers,
    Path,
    Values,
    integers,
    token_ids,
)
from growkit.families.layer_fields import leaf, with_values
from growkit.verification.sight import Sight, feature_width, find_sight

_SIDE = 4  # patches along a picture
_TOKENS = re.compile(r".*(tokens_per_image|image_seq_len|image_tokens|image_length).*")
_WIDTH = re.compile(r".*(out|proj|hidden|dim|embed|size|width).*")
_NO_WIDTH = re.compile(r".*(image_size|patch|vocab|token|kernel|window|position|layers|merge).*")
_MOST_WIDTHS = 24


def with_sight(builder: Builder, values: Values, layers: Layers) -> tuple[Values, Sight | None]:
    """The twin with towers that work, and what they are given; None where nothing is accepted."""
    if not layers.place or layers.second:
        return values, None
    hidden = hidden_of(values, layers.place)
    for changes in _small_towers(values, layers):
        try:
            small = with_values(values, changes)
            model = _built(builder, small)
            width = feature_width(model, token_ids(model))
            if width in (0, hidden[1]) and (sight := find_sight(model, token_ids(model))):
                return small, sight
        except Exception:  # a refusal of the class
            continue
        if not width:
            continue
        for chosen in _widths(small, layers.place, hidden[1]):
            try:
                tried = with_values(small, dict.fromkeys(chosen, hidden[1]))
                model = _built(builder, tried)
                if feature_width(model, token_ids(model)) != hidden[1]:
                    continue
                if sight := find_sight(model, token_ids(model)):
                    return tried, sight
            except Exception:
                continue
    return values, None


def _built(builder: Builder, values: Values) -> Any:
    """A model whose every part counts: some classes begin their projector with zeros."""
    model = builder.build(values)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.add_(0.1 * noise if value.dim() < 2 else noise / min(value.shape[-2:]) ** 0.5)
    return model


def hidden_of(values: Mapping[str, Any], place: Path) -> tuple[Path, int]:
    """The field of the language model's hidden size, by its name, and its value."""
    inner = leaf(values, place)
    for name, value in inner.items():
        if isinstance(value, int) and HIDDEN.fullmatch(name):
            return (*place, name), value
    return place, 0


def grows_along(builder: Builder, values: Values, layers: Layers) -> tuple[Path, ...]:
    """Fields of a wrapper's other parts that say the hidden size of its language model again: with
    them alone another hidden size is accepted, and seen."""
    if builder.sight is None:
        return ()
    path, hidden = hidden_of(values, layers.place)
    heads = {
        p: 2 * v
        for p, v in integers(values)
        if p[:-1] == layers.place and (HEADS.fullmatch(p[-1]) or KV_HEADS.fullmatch(p[-1]))
    }
    for more in ({}, heads):
        grown = {path: 2 * hidden, **more}
        for chosen in [(), *_equal(values, layers.place, hidden)]:
            try:
                larger = with_values(values, grown | dict.fromkeys(chosen, 2 * hidden))
                model = _built(builder, larger)
                if find_sight(model, token_ids(model)) == builder.sight:
                    return chosen
            except Exception:  # a refusal of the class
                continue
    return ()


def _elsewhere(values: Mapping[str, Any], place: Path) -> Iterator[tuple[Path, int]]:
    """Whole numbers of the parts beside the language model."""
    for path, value in integers(values):
        if path[: len(place)] != place:
            yield path, value


def _widths(values: Mapping[str, Any], place: Path, hidden: int) -> Iterator[tuple[Path, ...]]:
    """Fields that may say how wide a tower's output is: single ones, then two."""
    paths = [
        path
        for path, value in _elsewhere(values, place)
        if _WIDTH.fullmatch(path[-1]) and not _NO_WIDTH.fullmatch(path[-1]) and value > 1
    ]
    paths.sort(key=lambda path: not re.search("out|proj", path[-1]))
    yield from ((path,) for path in paths[:_MOST_WIDTHS])
    yield from combinations([p for p in paths if re.search("out|proj", p[-1])][:6], 2)


def _equal(values: Mapping[str, Any], place: Path, hidden: int) -> Iterator[tuple[Path, ...]]:
    """Sets of fields of the value of the hidden size."""
    paths = [path for path, value in _elsewhere(values, place) if value == hidden]
    for size in (1, 2, 3):
        yield from combinations(paths, size)


def _small_towers(values: Mapping[str, Any], layers: Layers) -> Iterator[dict[Path, Any]]:
    """Sizes of towers that go together, of small pictures first."""
    place = layers.place
    small: dict[Path, Any] = {}
    tokens: dict[Path, Any] = {}
    for path, value in _elsewhere(values, place):
        part = leaf(values, path[:-1])
        if path[-1] in ("image_size", "img_size") and isinstance(part.get("patch_size"), int):
            small[path] = _SIDE * part["patch_size"]
            for name, pairs in values.items():
                if _is_pairs(pairs) and value:
                    small[name,] = [[side * small[path] // value for side in p] for p in pairs]
        if path[-1] == "head_dim":
            width = next((v for n, v in part.items() if HIDDEN.fullmatch(n)), 0)
            heads = next((v for n, v in part.items() if HEADS.fullmatch(n)), 0)
            if isinstance(width, int) and isinstance(heads, int) and heads:
                small[path] = width // heads
        if _TOKENS.fullmatch(path[-1]) and value > 4:
            tokens[path] = 4
    for name, part in values.items():
        if isinstance(part, Mapping) and (name,) != place:
            small.update(_fed_layers((name,), part, layers.count))
            sides, patch = part.get("image_size"), part.get("patch_size")
            if isinstance(sides, list) and isinstance(patch, list) and len(sides) == len(patch):
                small[name, "image_size"] = [_SIDE * side for side in patch]
    unlike = {path: value for path, value in small.items() if path[-1] not in ("image_size",)}
    seen: list[dict[Path, Any]] = []
    for changes in (small | tokens, small, unlike, {}):
        if changes not in seen:
            seen.append(changes)
            yield changes


def _is_pairs(value: Any) -> bool:
    """A list of sizes of pictures."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(n, int) for n in pair)
            for pair in value
        )
    )


def _fed_layers(place: Path, part: Mapping[str, Any], most: int) -> Iterator[tuple[Path, Any]]:
    """Lists of layers of a tower whose output is looked at: the first ones, of a tower with as many
    layers; no more of them than layers of the language model, which may each be given one."""
    depth = next((n for n in ("depth", "num_hidden_layers") if isinstance(part.get(n), int)), None)
    for name, value in part.items():
        numbers = isinstance(value, list) and value and all(type(n) is int for n in value)
        if depth and numbers and max(value) >= part[depth] and len(value) <= 8:
            few = min(len(value), most)
            yield (*place, name), list(range(few))
            yield (*place, depth), max(part[depth], few)
