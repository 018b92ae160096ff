"""A grown config: sizes, and what it says of layers that have moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from growkit.core.errors import UsageError
from growkit.families.base import Config, LayerRule
from growkit.families.derived.config_sizes import ConfigSizes
from growkit.families.derived.form import layers_fed
from growkit.families.layer_fields import (
    LABELS,
    factor_fields,
    factor_stated,
    leaf,
    move_counts,
    move_entry,
    move_sections,
    with_values,
)
from growkit.families.unit_layout import Sizes


class ConfigChanges:
    """Writes sizes and moved layers into a config.

    ``read``: the config before.
    """

    def __init__(self, read: ConfigSizes) -> None:
        self.read, self.table, self.config = read, read.table, read.config
        self.place, self.axes, self.second = read.place, read.axes, read.second

    def fields(self, sizes: Sizes) -> dict[str, Any]:
        """Fields of config.json, those of parts in their part, that state these sizes."""
        read, at = self.read, self.read.path
        changes: dict[tuple[str, ...], Any] = {
            at(field): sizes[name] * int(divisor or 1)
            for name, fields in self.axes.items()
            for field, _, divisor in (path.partition("/") for path in fields)
        }
        for name in [name for axis in self.axes for name in self.axes[axis] if "*" in name]:
            changes |= self._with_factor(name, changes.pop(at(name)), changes)
        if read.rounded and read.rounds(self.config):  # stated exactly from the first growth on
            kept = all(sizes[axis] == read.stored_width(axis) for axis in read.rounded)
            for name in (name for axis in read.rounded for name in self.axes[axis] if kept):
                changes.pop(at(name))
            if not kept:
                exact = at(self.table["rounded"]["flag"])
                changes[exact] = self.table["rounded"]["exact"]
        for name in (f for axis in self.axes if axis.startswith("ffn") for f in self.axes[axis]):
            path, value = at(name), changes.get(at(name))
            if name in self.table["implied"] and leaf(self.config, path) is None:
                silent = with_values(self.config, changes | {path: None})
                changes[path] = None if read.number(silent, name) == value else value
        for name, older in self.table.get("older", {}).items():
            if at(name) in changes and leaf(self.config, at(older)) is not None:
                changes[at(older)] = changes[at(name)]
        if read.layer_field:
            changes[at(read.layer_field)] = sizes["layer"] * read.each
        if self.second:
            changes[at(self.second["field"])] = sizes["decoder_layer"]
        flag = {"flag": "", "^flag": "^"}.get(str(self.table["tied"]))
        if flag is not None:
            changes[at(f"{flag}tie_word_embeddings")] = bool(sizes["tied"])
        if rotary := read.rotary():
            old, new = read.sizes(self.config)["head_dim"], sizes["head_dim"]
            rotated, inner = rotary.rotated(self.config, old), leaf(self.config, self.place)
            if new != old:
                written = rotary.rewritten(inner, new, rotated)
                changes |= {(*self.place, name): value for name, value in written.items()}
        for path, value in changes.items():
            if isinstance(leaf(self.config, path), list):  # stated for each layer
                changes[path] = [value] * sizes["layer"]
        if all(len(path) == 1 for path in changes):
            return {path[0]: value for path, value in changes.items()}
        grown = with_values(self.config, changes)
        return {path[0]: grown[path[0]] for path in changes}

    def _with_factor(
        self, name: str, width: int, changes: Mapping[tuple[str, ...], Any]
    ) -> dict[tuple[str, ...], Any]:
        """What states a width that the class makes of a factor; nothing if it does so already."""
        grown = with_values(self.config, changes)
        if self.read.number(grown, name) == width:
            return {}
        fields = factor_fields(name)
        assert fields is not None
        said = factor_stated(name, width, self.read.number(grown, fields[1]))
        return {self.read.path(field): value for field, value in said.items()}

    def map_layers(self, config: Config, sources: Sequence[int], stack: str) -> dict[str, Any]:
        """What the config says of layers, after they have moved."""
        if min(sources) < 0:
            raise UsageError(
                f"The derived table of {self.table['model_type']} knows no layers made of none.",
                "Insert copies: leave --depth-method at identity.",
            )
        if stack != "layer":
            return self._map_second(config, sources)
        old = self.read.layer_count(self.config)
        fed = min(old, layers_fed(self.config))
        if self.table["operators"] and list(sources[:fed]) != list(range(fed)):
            raise UsageError(
                f"{self.table['class']} adds features of images behind its first {fed} layers "
                "(deepstack), so that no layer can be inserted between them.",
                f"Insert behind them: --layer-placement end, or indices from {fed - 1} on.",
            )
        inner = leaf(self.config, self.place)
        entries = [s * self.read.each + part for s in sources for part in range(self.read.each)]
        moved = {
            name: entry
            for name, value in inner.items()
            if name != LABELS
            and (entry := move_entry(value, old * self.read.each, entries)) is not None
            and name not in self.table["layers"].get("other", ())
            and not any(name in fields for fields in self.axes.values())
        }
        for name, period in self.table["layers"]["lists"].items():
            if inner.get(name) is None:
                kinds = [period[source % len(period)] for source in sources]
                made = repeated(period)(config, len(sources))
                if kinds != made or any(kind != kinds[0] for kind in kinds):
                    moved[name] = kinds  # readers other than transformers have rules of their own
        stated = {**self.table["defaults"], **inner}
        moved |= move_counts(stated, self.table["layers"]["counts"], old, sources)
        moved |= move_sections(stated, self.table["layers"].get("sections", ()), entries)
        if not self.place:
            return moved
        grown = with_values(config, {(*self.place, name): v for name, v in moved.items()})
        return {self.place[0]: grown[self.place[0]]}

    def _map_second(self, config: Config, sources: Sequence[int]) -> dict[str, Any]:
        """What the config says of the decoder's layers, after they have moved."""
        if self.second["alone"]:
            return {}
        place = tuple(self.second["place"])
        old, inner = self.read.layers_of(self.config, "decoder_layer"), leaf(self.config, place)
        moved = {
            name: entry
            for name, value in inner.items()
            if name != LABELS and (entry := move_entry(value, old, sources)) is not None
        }
        moved |= move_counts(inner, self.second["counts"], old, sources)
        grown = with_values(config, {(*place, name): value for name, value in moved.items()})
        return {place[0]: grown[place[0]]} if place else moved


def repeated(period: Sequence[Any]) -> LayerRule:
    """The list that the class makes for any depth."""
    return lambda config, layers: [period[layer % len(period)] for layer in range(layers)]
