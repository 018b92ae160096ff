"""Sizes of a model: what its config says, in the words of a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

from growkit.core.errors import UsageError
from growkit.families.base import Config, Stack
from growkit.families.derived.form import of_every_layer, width_name
from growkit.families.derived.layer_masks import mask_of
from growkit.families.head_dim_rules import PartialRotary
from growkit.families.layer_fields import factor_fields, leaf, made_of_factor


class ConfigSizes:
    """What a config says, in the words of a table.

    ``names``: of the tensors that are stored, with their headers where they are at hand.
    """

    def __init__(self, table: Mapping[str, Any], config: Config, names: Collection[str]) -> None:
        self.table, self.config, self.names = table, config, names
        self.prefix: str = table.get("prefix", "")
        if self.prefix and not any(name.startswith(self.prefix) for name in names):
            names = self._prefixed(names)
        self.place = tuple(table["place"])
        self.axes: dict[str, list[str]] = table["axes"]
        self.layer_field: str | None = table["layers"]["field"]
        self.stream: Mapping[str, Any] = table.get("stream", {})
        self.second: dict[str, Any] = table.get("second") or {}
        shapes = names if isinstance(names, Mapping) else {}
        self.stored = {
            name: tuple(shape)
            for name, info in shapes.items()
            if (shape := getattr(info, "shape", None)) is not None
        }
        fills = table.get("fills") or {}
        self.fills: dict[str, list[str]] = {"query_head": []} if fills is True else fills
        self.rounded: dict[str, Any] = table.get("rounded", {}).get("stored", {})
        self.blocks: dict[str, Any] = table.get("blocks", {})
        self.each = self._entries_of_a_layer()
        self.masks = self._masks(config, names)

    def _prefixed(self, names: Collection[str]) -> Mapping[str, Any]:
        """The names of a file without the prefix of the model's body, with it."""
        outer = {t["name"] for t in self.table["tensors"] if not t["name"].startswith(self.prefix)}
        infos = names if isinstance(names, Mapping) else dict.fromkeys(names)
        return {n if n in outer else self.prefix + n: info for n, info in infos.items()}

    def stacks(self) -> tuple[Stack, ...]:
        """One of a decoder or an encoder; both of an encoder-decoder, whose target tokens meet
        their own past and the whole source, in two caches."""
        kind = self.table.get("kind", "decoder")
        if kind == "decoder":
            return (Stack(),)
        encoder = Stack("layer", attended=1.0, caches=0)
        return (encoder, Stack("decoder_layer", 1.5, 2)) if self.second else (encoder,)

    def number(self, config: Config, name: str, depth: int = 0) -> int:
        """A number of the config, or what the class makes of its absence.

        Raises:
            UsageError: neither is a whole number.
        """
        if fields := factor_fields(name):
            factor, of, multiple = fields
            stated = leaf(leaf(config, self.place), (factor,))
            stated = self.table["defaults"].get(factor) if stated is None else stated
            if not isinstance(stated, int | float):
                raise UsageError(f"config.json has {factor} = {stated!r}.", "Set it to a number.")
            rounding = self.number(config, multiple) if multiple else 1
            return made_of_factor(stated, self.number(config, of), rounding)
        name, _, divisor = name.partition("/")
        if divisor:
            return self.number(config, name, depth) // int(divisor)
        inner = config if name.startswith("^") else leaf(config, self.place)
        path = tuple(name.removeprefix("^").split("."))
        value = leaf(inner, path) if isinstance(inner, Mapping) else None
        if older := self.table.get("older", {}).get(name):
            value = leaf(inner, (older,)) or value
        if value is None and (other := self.table.get("spellings", {}).get(name)):
            value = inner.get(other)
        implied = self.table["implied"].get(name)
        if value is None and implied and depth < 4:
            rule, *sources = implied
            parts = [
                s if isinstance(s, int) else self.number(config, s, depth + 1) for s in sources
            ]
            if rule == "quotient":
                return parts[0] // max(1, parts[1])
            return prod(parts)
        if value is None:
            value = self.table["defaults"].get(name)
        value = of_every_layer(value)
        if isinstance(value, int) and name in self.blocks.get("fields", ()):
            value //= self.each
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UsageError(
                f"config.json has {name} = {value!r}.",
                f"Set {name} to a positive whole number"
                + (", the same for every layer." if isinstance(value, list) else "."),
            )
        return value

    def layer_count(self, config: Config) -> int:
        """Layers of the first stack.

        Raises:
            UsageError: config.json has not the list that counts them.
        """
        if self.layer_field:
            return self.number(config, self.layer_field)
        inner = leaf(config, self.place)
        lists = self.table["layers"]["counted_by"]
        value = inner.get(lists)
        if not isinstance(value, list):
            raise UsageError(f"config.json has no list {lists}.", "It says what the layers are.")
        return len(value)

    def layers_of(self, config: Config, stack: str) -> int:
        """Layers of a stack."""
        if stack == "layer":
            return self.layer_count(config)
        return self.number(config, self.second["field"])

    def sizes(self, config: Config) -> dict[str, int]:
        """Units of every axis; numbers that sizes depend on, as ``.NAME``; ``tied`` (0 or 1); and
        bits of the layers that a pattern of tensors is in, as ``layers:N``, where they are told."""
        sizes = {"layer": self.layer_count(config)}
        if self.second:
            sizes["decoder_layer"] = self.layers_of(config, "decoder_layer")
        for axis, paths in self.axes.items():
            as_stored = axis in self.rounded and self.rounds(config)
            sizes[axis] = self.number(config, paths[0]) if paths and not as_stored else 1
            if as_stored:
                sizes[axis] = self.stored_width(axis)
        for name in self.table["numbers"]:
            sizes[f".{name}"] = self.number(config, name)
        if "kv_head" not in sizes and "query_head" in sizes:
            sizes["kv_head"] = sizes["query_head"]
        for axis, times in self.fills.items():
            whole = sizes["hidden"] * prod(sizes[f".{name}"] for name in times)
            sizes[width_name(axis)] = whole // max(1, sizes[axis])
        if "head_width" in sizes:
            sizes["head_dim"] = sizes["head_width"]
        sizes["tied"] = int(self.tied(config))
        for number, mask in enumerate(self._masks(config, ())):
            if mask is not None:
                sizes[f"layers:{number}"] = mask
        return sizes

    def rounds(self, config: Config) -> bool:
        """The class makes other widths of those that this config states."""
        flag = self.table["rounded"]["flag"]
        value = leaf(leaf(config, self.place), tuple(flag.split(".")))
        value = self.table["defaults"].get(flag) if value is None else value
        return bool(value) != self.table["rounded"]["exact"]

    def stored_width(self, axis: str) -> int:
        """Units of an axis as the file has them.

        Raises:
            UsageError: there is no file.
        """
        name, dim, block = self.rounded[axis]
        shape = self.shape(name)
        if shape is None:
            raise UsageError(
                f"config.json does not say how wide the FFN is: {self.table['class']} rounds "
                f"{self.axes[axis][0]} ({self.table['rounded']['flag']}).",
                "Give the folder with its weights.",
            )
        return int(shape[dim] // block)

    def tied(self, config: Config) -> bool:
        """The output projection is the embedding."""
        rule, name = self.table["tied"], "tie_word_embeddings"
        if rule not in ("flag", "^flag"):
            return bool(rule)
        flag = leaf(config, (*self.place, name)) if rule == "flag" else None
        flag = config.get(name) if flag is None else flag
        default = self.table["defaults"].get(name if rule == "flag" else f"^{name}")
        return bool(default if flag is None else flag)

    def rotary(self) -> PartialRotary | None:
        """The factor by which a part of each head is rotated, where heads can grow with it."""
        said = self.table.get("heads") or {}
        if not said.get("rotary"):
            return None
        field, default = said["rotary"]
        return PartialRotary(field, default, self.place)

    def path(self, name: str) -> tuple[str, ...]:
        """Where the config has a field of the table."""
        if name.startswith("^"):
            return tuple(name[1:].split("."))
        return (*self.place, *name.split("."))

    def _entries_of_a_layer(self) -> int:
        """How many entries the config has for each layer."""
        stated = leaf(self.config, self.place).get(self.blocks["list"]) if self.blocks else None
        several = isinstance(stated, list) and any(word in self.blocks["words"] for word in stated)
        return int(self.blocks["each"]) if several else 1

    def stored_facts(self, names: Collection[str]) -> dict[str, int]:
        """The bits of layers by pattern, from the names of the tensors of a file."""
        if any("{layer}" in name for name in names):  # names of a plan, not of a file
            return {}
        masks = self._masks(self.config, names)
        return {f"layers:{i}": mask for i, mask in enumerate(masks) if mask is not None}

    def _masks(self, config: Config, names: Collection[str]) -> list[int | None]:
        """Which layers have the tensors of each pattern: from the names, else by its rule."""
        inner = leaf(config, self.place)
        stated = {**self.table["defaults"], **inner}
        found: list[int | None] = []
        for pattern in self.table["patterns"]:
            layers = self.layers_of(config, pattern.get("stack", "layer"))
            if "stack" in pattern and self.second["place"]:
                stated = dict(leaf(config, tuple(self.second["place"])))
            if names:
                here = [pattern["name"].replace("{layer}", str(i)) in names for i in range(layers)]
                exclusive = pattern.get("shape_rule")
                if not exclusive:
                    found.append(sum(1 << i for i, has in enumerate(here) if has))
                    continue
            found.append(mask_of(pattern["rule"], stated, self.table["layers"]["lists"], layers))
        return found

    def shape(self, name: str, mask: int | None = -1) -> tuple[int, ...] | None:
        """The shape of a stored tensor, in the first layer of these bits that has it."""
        if "{layer}" not in name:
            return self.stored.get(name)
        name = name.replace("{expert}", "0")
        layers = [n for n in range(self.layer_count(self.config)) if (mask or 0) >> n & 1]
        shapes = (self.stored.get(name.replace("{layer}", str(layer))) for layer in layers)
        return next((shape for shape in shapes if shape is not None), None)
