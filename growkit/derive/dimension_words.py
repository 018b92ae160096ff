"""What a dimension of a tensor is made of, as segments of units of axes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from growkit.derive.axes import PER, Polynomial, Role, evaluate
from growkit.derive.axis_words import AxisWords
from growkit.derive.builder import Underivable
from growkit.derive.pictures import hidden_of
from growkit.derive.widths import DEAD, FIXED, MIXED, Segment, blocks_of, in_sections, segments_of


class Unspeakable(Underivable):
    """A dimension of which these axes cannot be said."""

    def __init__(self, cause: str, axes: Sequence[str]) -> None:
        super().__init__(cause)
        self.axes = list(axes)


class DimensionWords:
    """Says dimensions of roles in the axes of ``words``."""

    def __init__(self, words: AxisWords) -> None:
        self.words, self.found = words, words.found

    def dim(self, number: int, role: Role, dim: int) -> list[Any]:
        """``[reads, segments]`` of one dimension."""
        try:
            return self._said(number, role, dim)
        except Unspeakable:
            raise
        except Underivable as error:
            raise Unspeakable(error.cause, self._axes_at(number, dim)) from error

    def _axes_at(self, number: int, dim: int) -> list[str]:
        """Axes that grow a dimension."""
        depends = set(self.found.axes.roles[number].depends[dim])
        found = [
            axis
            for axis, width in self.found.widths.items()
            if (number, dim) in {*width.readers, *width.labels}
            or depends & set(self.found.paths[axis])
        ]
        if not found and self.found.stream is not None and self.found.stream.path in depends:
            found.append("hidden")
        return found

    def _said(self, number: int, role: Role, dim: int) -> list[Any]:
        size, width = self.words.size_of(number, dim), role.shape[dim]
        if size is None:
            if self._axes_at(number, dim):
                raise Underivable(f"The size of {role.name} does not follow from the config.")
            return [0, [["", [["fixed", [["stored", role.name, dim]]]]]]]
        codes, names, fields = np.full(width, -1), list(self.found.widths), {}
        labels = np.full(width, FIXED)
        reads = False
        for axis, found in self.found.widths.items():
            units = self.found.axes.fields[self.found.paths[axis][0]]
            if (number, dim) in found.readers:
                if width % units:
                    raise Underivable(f"{role.name} does not read whole units.")
                labels, codes = (
                    np.arange(width) // (width // units),
                    np.full(width, names.index(axis)),
                )
                reads = True
            elif (number, dim) in found.labels:
                mine = found.labels[number, dim]
                labels, codes, names = self._labelled(mine, axis, labels, codes, names, number, dim)
        layers = self.found.layers.count
        if dim in role.by_layer:
            part = {key: factor // layers for key, factor in size.items()}
            if any(factor % layers for factor in size.values()):
                raise Underivable(f"{role.name} has no equal part for each layer.")
            return [0, [["layer", [["layer", self.words.size(part)]]]]]
        if not (labels >= 0).any():
            if known := self._plain_axis(size):
                return [0, [[known, [[known, [[1]]]]]]]
            if (streamed := self.of_stream(number, dim, size)) is not None:
                return streamed
            if self.hidden_unseen:
                return [0, [["", [["fixed", [["stored", role.name, dim]]]]]]]
            return [0, [["", [["fixed", self.words.size(size)]]]]]
        counts = {axis: self.found.axes.fields[p[0]] for axis, p in self.found.paths.items()}
        fields = {axis: paths[0] for axis, paths in self.found.paths.items()}
        segments: list[Segment] = segments_of(labels, codes, names, counts)
        blocks = blocks_of(segments, size, fields, self.found.axes.fields)
        said = [
            [
                s.over,
                [
                    [axis, self.words.size(block)]
                    for (axis, _), block in zip(s.items, b, strict=True)
                ],
            ]
            for s, b in zip(segments, blocks, strict=True)
        ]
        return [int(reads), said]

    def _labelled(
        self,
        mine: Any,
        axis: str,
        labels: Any,
        codes: Any,
        names: list[str],
        number: int,
        dim: int,
    ) -> tuple[Any, Any, list[str]]:
        """Labels of an axis (and of the axis that it shares) written over what is known."""
        role, path = self.found.axes.roles[number], self.found.paths[axis][0]
        units, size = self.found.axes.fields[path], self.words.size_of(number, dim) or {}
        partly = axis in self.found.fills and any(path not in key for key in size)
        shared = axis == "query_head" and "kv_head" in self.found.paths
        if (mine == DEAD).any() or (mine == MIXED).any() or (partly and not shared):
            whole = self._guess(number, dim, axis, units)
            whole = self._of_sibling(number, dim, axis) if whole is None else whole
            whole = self._with_fixed(number, dim, axis, mine) if whole is None else whole
            if whole is None:
                raise Underivable(f"The units of {role.name} cannot be told apart.")
            mine = whole
        labels, codes = labels.copy(), codes.copy()
        target = "kv_head" if axis == "query_head" and "kv_head" in self.found.paths else ""
        shared = bool(target) and any(self.found.paths[target][0] in key for key in size)
        own = any(path in key for key in size)
        if target and target not in names:
            names = [*names, target]
        here = mine >= 0
        if shared and own:
            theirs = mine >= units
            labels[here] = np.where(theirs, mine - units, mine)[here]
            codes[here] = np.where(theirs, names.index(target), names.index(axis))[here]
        else:
            labels[here] = mine[here]
            codes[here] = names.index(target if shared else axis)
        return labels, codes, names

    def _guess(self, number: int, dim: int, axis: str, units: int) -> Any:
        """Where probes are silent: units in order, if the size is theirs; the proof decides."""
        size = self.words.size_of(number, dim) or {}
        width = self.found.axes.roles[number].shape[dim]
        path = self.found.paths[axis][0]
        kv = self.found.paths.get("kv_head", [None])[0] if axis == "query_head" else None
        if all(path in key for key in size):
            return np.arange(width) // (width // units)
        if kv and all(kv in key for key in size):
            groups = self.found.axes.fields[kv]
            return np.arange(width) // (width // groups)
        return None

    def _of_sibling(self, number: int, dim: int, axis: str) -> Any:
        """A bias stands in the order of its matrix (a key's own has no gradient at all)."""
        roles, stem = self.found.axes.roles, self.found.axes.roles[number].name.rpartition(".")[0]
        for (other, there), labels in self.found.widths[axis].labels.items():
            alike = other != number and roles[other].name.rpartition(".")[0] == stem
            if alike and self.words.size_of(other, there) == self.words.size_of(number, dim):
                if (labels < 0).any() or axis in self.found.fills:
                    labels = self._with_fixed(other, there, axis, labels)
                if labels is not None and not (labels == DEAD).any():
                    return labels
        return None

    def _with_fixed(self, number: int, dim: int, axis: str, mine: Any) -> Any:
        """Elements that all units use alike (a key/value head that all query heads share), if the
        size has such a part: they stay."""
        path, fields = self.found.paths[axis][0], self.found.axes.fields
        size = self.words.size_of(number, dim) or {}
        if all(path in key for key in size):
            return None
        sections = {
            evaluate({key: 1}, fields) // fields[path]: count
            for key, count in size.items()
            if path in key
        }
        return in_sections(mine, fields[path], sections)

    def _plain_axis(self, size: Polynomial) -> str | None:
        """The axis of a dimension that has just its units (vocabulary, experts)."""
        if len(size) != 1:
            return None
        ((key, factor),) = size.items()
        axis = self.words.by_path.get(key[0]) if len(key) == 1 and factor == 1 else None
        return axis if axis in ("vocab", "expert") else None

    def of_stream(self, number: int, dim: int, size: Polynomial) -> list[Any] | None:
        """A dimension of the residual stream, or of units of its size inside a block."""
        stream = self.found.stream
        if stream is None or (number, dim) not in stream.inside:
            path = stream.path if stream else None
            plain = size == {(path,): 1} if path else self._hidden_alone(size)
            return [0, [["hidden", [["hidden", [[1]]]]]]] if plain else None
        ((key, factor),) = size.items()
        rest = list(key)
        rest.remove(stream.path)
        if any(path[0] == PER for path in rest):
            return None
        normed = number in stream.gains or number in stream.biases
        reads = 1 if (number, dim) in stream.readers else 2 * int(normed)
        return [reads, [["hidden", [["hidden", [self.words.product(tuple(rest), 1)]]]]] * factor]

    @cached_property
    def hidden_unseen(self) -> bool:
        """Whether the hidden size could not be changed by itself (Zamba), so that the twin's stands
        in sizes as a number. The model's own is another one, which its files have to say."""
        sizes = [dim or {} for role in self.found.axes.roles for dim in role.sizes]
        path, hidden = hidden_of(self.found.values, self.found.layers.place)
        return {(): hidden} in sizes and not any(path in key for size in sizes for key in size)

    def _hidden_alone(self, size: Polynomial) -> bool:
        ((key, factor),) = size.items() if len(size) == 1 else ((((),), 0),)
        return len(key) == 1 and factor == 1 and self.words.by_path.get(key[0]) == "hidden"
