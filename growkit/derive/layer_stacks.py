"""How a config counts the layers of its stacks, and of which kinds they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from growkit.derive.builder import Builder, Path, Shapes, Underivable, Values
from growkit.families.layer_fields import LABELS, leaf, move_entry, move_sections, with_values


@dataclass(frozen=True)
class Layers:
    """How a config counts the layers of its (first) stack.

    Attributes:
        place: path of the part of the config that speaks of them.
        field: name of the number there, or None where the length of a list says it.
        count: how many there are.
        other: names of lists that are as long by chance: not so in the model itself.
        part: of the names of its modules, where a model has two stacks.
        shared: the layers of a model are these ones, again and again.
        alone: the config says nothing else of these layers than their number.
        second: the decoder's stack of an encoder-decoder.
        mates: other fields that have to say the same number.
        sections: fields that count the layers of sections one behind another.
    """

    place: Path
    field: str | None
    count: int
    other: frozenset[str] = frozenset()
    part: str = ""
    alone: bool = False
    shared: bool = False
    second: Layers | None = None
    mates: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()

    @property
    def counter(self) -> Path:
        """Path of the number of layers."""
        return (*self.place, self.field or "")

    def moved(self, values: Mapping[str, Any], sources: Sequence[int]) -> Values:
        """The config whose layers are made of these: what it says of each layer moves along.

        Lists with one entry a layer, dicts keyed by a layer's index, lists of such indices; other
        numbers are left alone.
        """
        inner = leaf(values, self.place)
        changes: dict[Path, Any] = {}
        for name, value in ({} if self.alone else inner).items():
            moved = move_entry(value, self.count, sources)
            if moved is not None and name not in self.other and name != LABELS:
                path = (*self.place, name)
                changes[path] = moved
        for name in (self.field, *self.mates):
            path = (*self.place, name or "")
            if name:
                changes[path] = len(sources)
        sections = move_sections(inner, self.sections, sources)
        changes |= {(*self.place, name): size for name, size in sections.items()}
        return with_values(values, changes)


def text_place(values: Mapping[str, Any]) -> Path:
    """Where a wrapper keeps the config of its language model; empty for a plain one."""
    for name in ("text_config", "llm_config", "language_config", "global_config"):
        if isinstance(values.get(name), Mapping):
            return (name,)
    return ()


_TOWER = re.compile(r"(vision|visual|audio|image|speech|vq)\w*_config")


def towers_beside(values: Mapping[str, Any]) -> frozenset[str]:
    """Sections for towers in a config whose own fields speak of the language model."""
    flat = not text_place(values)
    return frozenset(
        name
        for name, part in values.items()
        if flat and isinstance(part, Mapping) and _TOWER.fullmatch(name)
    )


def find_layers(builder: Builder, values: Mapping[str, Any]) -> Layers:
    """Which field counts the layers, as the class itself calls it; of both stacks, where there are
    an encoder and a decoder."""
    if two := _two_stacks(values):
        return two
    place = text_place(values)
    inner = leaf(values, place)
    config = builder.config(values)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    names = [text.attribute_map.get("num_hidden_layers", "num_hidden_layers")]
    names += ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"]
    counts = {n: v for n in names if isinstance(v := inner.get(n), int) and v > 0}
    stages = inner.get("depths")
    if isinstance(stages, list) and set(counts.values()) <= {len(stages)}:
        raise Underivable(
            f"Its layers stand in {len(stages)} stages of widths of their own (depths), of which "
            "no growth is derived."
        )
    for name, value in counts.items():
        if len(counts) == 1 or _counts(builder, values, (*place, name)):
            groups = inner.get("num_hidden_groups")
            if isinstance(groups, int) and groups < value:
                return Layers(place, "num_hidden_groups", groups, shared=True)
            # Of several transformers one behind another: the stack that is called like its section.
            part = "global" if place == ("global_config",) else ""
            return _with_mates(builder, values, Layers(place, name, value, part=part))
    for name, value in inner.items():
        words = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        if re.search("layer|block", name) and words and value:
            return Layers(place, None, len(value))
    raise Underivable("No field of the config counts its layers.")


def _with_mates(builder: Builder, values: Mapping[str, Any], layers: Layers) -> Layers:
    """The field by which the class makes its layers: one that has to be changed together with
    another of the same number, or (where the first counts more than the layers, as steps of a loop
    over them) another one alone, or one that is the sum of others, which count sections."""
    inner = leaf(values, layers.place)
    few = range(min(2, layers.count))

    def makes(changed: Layers, sources: Sequence[int] = few) -> bool:
        try:
            names = list(builder.shapes(changed.moved(values, sources)))
        except Exception:  # a refusal of the class
            return False
        return stack_prefix(names, len(sources)) is not None

    if makes(layers):
        return layers
    others = {
        name: value
        for name, value in inner.items()
        if isinstance(value, int) and not isinstance(value, bool) and 1 < value <= layers.count
        if name != layers.field and re.search("layer|block", name)
    }
    for name, value in others.items():
        together = replace(layers, mates=(name,))
        if value == layers.count and makes(together):
            return together
    for name, value in others.items():
        alone = Layers(layers.place, name, value)
        if value < layers.count and layers.count % value == 0 and makes(alone):
            return alone
    for number in (2, 3):
        for names in combinations(others, number):
            sizes = [others[name] for name in names]
            parts = replace(layers, sections=names)
            if sum(sizes) == layers.count and makes(parts, [sum(sizes[:n]) for n in range(number)]):
                return parts
    return layers


def _two_stacks(values: Mapping[str, Any]) -> Layers | None:
    """Encoder and decoder of a config that speaks of both."""
    if not values.get("is_encoder_decoder"):
        return None
    parts = ("encoder",), ("decoder",)
    field = "num_hidden_layers"
    if all(isinstance(leaf(values, (*part, field)), int) for part in parts):
        first, second = (Layers(p, field, leaf(values, (*p, field)), part=p[0]) for p in parts)
        return replace(first, second=second)
    found: list[Layers] = []
    for part, names in (
        ("encoder", ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")),
        ("decoder", ("decoder_layers", "num_decoder_layers")),
    ):
        name = next((n for n in names if isinstance(values.get(n), int)), None)
        if name is None:
            return None
        found.append(Layers((), name, values[name], part=part, alone=bool(found)))
    return replace(found[0], second=found[1])


def _counts(builder: Builder, values: Mapping[str, Any], path: Path) -> bool:
    """The class has more tensors with a larger number there (a decoder alone has no encoder's)."""
    try:
        few, more = (builder.shapes(with_values(values, {path: size})) for size in (2, 3))
    except Exception:  # a refusal of the class
        return True
    return few != more


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def stack_prefix(names: Sequence[str], count: int, part: str = "") -> str | None:
    """What stands in front of the layer's number: the outermost list of ``count`` modules.

    ``part``: a word of the name.
    """
    found: dict[str, set[int]] = {}
    for name in names:
        for match in _NUMBER.finditer(name):
            found.setdefault(name[: match.start()], set()).add(int(match.group()))
    exact = [
        prefix
        for prefix, numbers in found.items()
        if numbers == set(range(count)) and part in prefix
    ]
    text = [prefix for prefix in exact if not re.search("vision|visual|audio|image", prefix)]
    return min(text or exact, key=lambda prefix: (prefix.count("."), prefix), default=None)


def layer_kinds(
    shapes: Shapes, layers: Layers, values: Mapping[str, Any]
) -> list[tuple[Any, ...]] | None:
    """What every layer is: its tensors and shapes, and what the config's lists say of it."""
    prefix = stack_prefix(list(shapes), layers.count, layers.part)
    if prefix is None:
        return None
    inside: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(layers.count)]
    for name, shape in shapes.items():
        if name.startswith(prefix):
            number, _, rest = name[len(prefix) :].partition(".")
            if number.isdigit() and int(number) < layers.count:
                inside[int(number)].append((rest, shape))
    entries = [
        value
        for value in leaf(values, layers.place).values()
        if isinstance(value, list)
        and len(value) == layers.count
        and all(isinstance(entry, str | int | float | bool) for entry in value)
        and len(set(value)) <= 4
    ]
    if layers.sections:
        sizes = [leaf(values, layers.place)[name] for name in layers.sections]
        entries.append([number for number, size in enumerate(sizes) for _ in range(size)])
    return [
        (tuple(sorted(tensors)), *(str(entry[layer]) for entry in entries))
        for layer, tensors in enumerate(inside)
    ]
