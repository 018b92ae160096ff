"""A twin of a multimodal model that sees: its towers made small together, and what they write made
as wide as the small language model.

The fields of a wrapper's parts say some sizes twice (the width that a tower's last projection has,
and the hidden size of the language model; the side of a picture, and how many tokens it becomes).
Which fields have to go with which is found by trying: what the class computes features of the right
width with, and what its logits then change with.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch

from growkit.derive.axes import HEADS, HIDDEN, KV_HEADS
from growkit.derive.builder import Builder, Path, Values, integers, token_ids
from growkit.derive.layer_stacks import Layers, towers_beside
from growkit.families.layer_fields import leaf, with_values
from growkit.verification.sight import KINDS, Sight, feature_width, find_sight, is_seen, objection

_SIDE = 4  # patches along a picture
_TOKENS = re.compile(r".*(tokens_per_image|image_seq_len|image_tokens|image_length).*")
_WIDTH = re.compile(r".*(out|proj|hidden|dim|embed|size|width).*")
_NO_WIDTH = re.compile(r".*(image_size|patch|vocab|token|kernel|window|position|layers|merge).*")
_MOST_WIDTHS = 24
_MOST_INPUTS = 8
_LAYERS = re.compile(r".*(layer|index|ind[ei]c|idx|block|depth).*")


def with_sight(builder: Builder, values: Values, layers: Layers) -> tuple[Values, Sight | None]:
    """The twin with towers that work, and what they are given; None where nothing is accepted."""
    if not (layers.place or towers_beside(values)) or layers.second:
        return values, None
    agreed: list[Values] = []
    for changes in _small_towers(values, layers):
        small = with_values(values, changes)
        agreed += [] if agreed else [small]
        if seen := _seen(builder, small, layers.place):
            return seen
    for small in _reconciled(builder, agreed[0], layers.place):
        if seen := _seen(builder, small, layers.place):
            return seen
    return values, None


def _seen(builder: Builder, small: Values, place: Path) -> tuple[Values, Sight] | None:
    """The twin whose towers write vectors of its hidden size, and what they are given."""
    for tried in _fitting(builder, small, place, KINDS):
        try:
            model = _built(builder, tried)
            if sight := find_sight(model, token_ids(model)):
                return tried, sight
        except Exception:  # a refusal of the class
            continue
    return None


def _fitting(
    builder: Builder, values: Values, place: Path, kinds: Sequence[str]
) -> Iterator[Values]:
    """Configs of which towers of these kinds write vectors of the hidden size."""
    if not kinds:
        yield values
        return
    hidden = hidden_of(values, place)[1]

    def width(tried: Values) -> int:
        model = _built(builder, tried)
        return feature_width(model, token_ids(model), kinds[0])

    try:
        found = width(values)
    except Exception:  # a refusal of the class
        return
    if found in (0, hidden):
        yield from _fitting(builder, values, place, kinds[1:])
        return
    for chosen in _widths(values, place, hidden):
        tried = with_values(values, dict.fromkeys(chosen, hidden))
        with contextlib.suppress(Exception):
            if width(tried) == hidden:
                yield from _fitting(builder, tried, place, kinds[1:])


def _reconciled(builder: Builder, values: Values, place: Path) -> Iterator[Values]:
    """Configs whose towers agree: of two sizes that the class finds unequal (a projector's input
    and what a tower made smaller gives) the field of the one becomes the other. For each of the
    inputs that are tried, which decide what it objects to."""

    def disagreeing(tried: Values, number: int) -> tuple[int, int] | None:
        model = _built(builder, tried)
        return objection(model, token_ids(model), number)

    with contextlib.suppress(Exception):  # no further input, or a class that is not built so
        for number in range(_MOST_INPUTS):
            now, unequal = values, disagreeing(values, number)
            while unequal is not None:
                for path, size in _either(now, place, unequal):
                    tried = with_values(now, {path: size})
                    try:
                        left = disagreeing(tried, number)
                    except Exception:  # a refusal of the class
                        continue
                    if left != unequal and (left is None or left[::-1] != unequal):
                        now, unequal = tried, left
                        break
                else:
                    break
            if now is not values:
                yield now


def _either(values: Values, place: Path, unequal: tuple[int, int]) -> Iterator[tuple[Path, int]]:
    """Fields of one of two sizes, and the other size; the larger one first, which the twin left."""
    for size in sorted(unequal, reverse=True):
        for path, value in _elsewhere(values, place):
            if value == size:
                yield path, unequal[0] + unequal[1] - size


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
                if is_seen(model, builder.sight, token_ids(model)):
                    return chosen
            except Exception:  # a refusal of the class
                continue
    return ()


def _elsewhere(values: Mapping[str, Any], place: Path) -> Iterator[tuple[Path, int]]:
    """Whole numbers of the parts beside the language model."""
    beside = towers_beside(values)
    for path, value in integers(values):
        if path[: len(place)] != place or path[0] in beside:
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
    beside = towers_beside(values)
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
        if _LAYERS.fullmatch(name) and _are_numbers(part):  # of the states of a tower of two layers
            small[name,] = [-1 - number % 2 for number in range(len(part))]
        if isinstance(part, Mapping) and part and all(str(key).isdigit() for key in part):
            small[name,] = {str(_SIDE * _SIDE): min(part.values())}  # by the number of patches
        if isinstance(part, Mapping) and (name,) != place and (place or name in beside):
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


def _are_numbers(value: Any) -> bool:
    """A list of whole numbers."""
    return isinstance(value, list) and bool(value) and all(type(n) is int for n in value)


def _fed_layers(place: Path, part: Mapping[str, Any], most: int) -> Iterator[tuple[Path, Any]]:
    """Lists of layers of a tower whose output is looked at: the first ones, of a tower with as many
    layers; no more of them than layers of the language model, which may each be given one."""
    depth = next((n for n in ("depth", "num_hidden_layers") if isinstance(part.get(n), int)), None)
    for name, value in part.items():
        numbers = _LAYERS.fullmatch(name) and _are_numbers(value)
        if depth and numbers and max(value) >= part[depth] and len(value) <= 8:
            few = min(len(value), most)
            yield (*place, name), list(range(few))
            yield (*place, depth), max(part[depth], few)
