"""Width: which tensors write the units of an axis, which one reads them, and in which order.

The reader of an axis is the tensor that the forward pass uses last: without it nothing else on the
axis has a gradient. Its units are numbered as they stand. Then it is left only those units whose
number has a certain bit, and what still has a gradient writes them: a few passes spell the number
of every row of every other tensor, in whatever order the class keeps them. A dimension that has a
gradient whatever is left mixes all units, so it reads them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.derive.axes import PER, Axes, Polynomial, evaluate
from growkit.derive.builder import Path, Underivable
from growkit.derive.stored import Arrays, StoredModel

Labels = npt.NDArray[np.int64]
SEEDS = (0, 1)
FIXED, MIXED, DEAD = -1, -2, -3
# Gradients of units that a norm couples to the others are at least so many times smaller.
COUPLED = 3.0
MOST_ROUNDS = 6


@dataclass(frozen=True)
class Segment:
    """Part of a dimension: all units of an axis in order, ``parts`` times; or nothing that grows.

    Attributes:
        items: (axis or "fixed", elements of a unit). Several: for each unit of ``over`` one after
            another, with its share of the units of their axes.
        over: the axis that is walked along; empty for a fixed part.
    """

    items: tuple[tuple[str, int], ...]
    over: str = ""


@dataclass
class Width:
    """What was found of one axis.

    Attributes:
        readers: (role, dimension) that read it.
        writers: (role, dimension) -> label of every element.
        coupled: a norm runs over the axis.
    """

    readers: set[tuple[int, int]] = field(default_factory=set)
    labels: dict[tuple[int, int], Labels] = field(default_factory=dict)
    coupled: bool = False


class WidthProbe:
    """Probes one twin.

    Args:
        model: the twin.
        axes: its roles.
        weights: its file.
        order: file names in the order of the forward pass.
    """

    def __init__(
        self, model: StoredModel, axes: Axes, weights: Arrays, order: Sequence[str]
    ) -> None:
        self.model, self.axes, self.weights = model, axes, weights
        self.position = {name: place for place, name in enumerate(order)}
        self.members: dict[int, list[str]] = {}
        for name in weights:
            layer, template, _ = axes.names.role_name(name)
            for place, role in enumerate(axes.roles):
                if role.name == template and (layer is None or layer in role.layers):
                    self.members.setdefault(place, []).append(name)

    def dims(self, path: Path) -> set[tuple[int, int]]:
        """(role, dimension) whose size depends on a field."""
        return {
            (place, dim)
            for place, role in enumerate(self.axes.roles)
            for dim, size in enumerate(role.sizes)
            if size and any(path in key for key in size)
        }

    def gradients(self, changed: Mapping[str, npt.NDArray[Any]], seed: int) -> Arrays:
        self.model.write({**self.weights, **changed})
        return self.model.gradients(seed)

    def of_role(self, gradients: Arrays, place: int, dim: int) -> npt.NDArray[np.float64]:
        """Size of the gradient along one dimension, over all tensors of a role."""
        total: npt.NDArray[np.float64] | None = None
        for name in self.members[place]:
            gradient = np.abs(gradients[name]).astype(np.float64)
            along = gradient.sum(axis=tuple(a for a in range(gradient.ndim) if a != dim))
            total = along if total is None else total + along
        assert total is not None
        return total

    def _size(self, key: tuple[int, int]) -> Polynomial:
        return self.axes.roles[key[0]].sizes[key[1]] or {}

    def paths(self, key: tuple[int, int]) -> set[Path]:
        """Fields that a dimension depends on."""
        size = self.axes.roles[key[0]].sizes[key[1]] or {}
        return {path[1:] if path[0] == PER else path for term in size for path in term}

    def find(
        self,
        path: Path,
        also: Sequence[Path] = (),
        *,
        inside: set[tuple[int, int]] | None = None,
        mixes: bool = True,
    ) -> Width:
        """Readers and labels of the axis that ``path`` counts.

        Args:
            also: fields of axes whose units these work with (key/value heads): what depends on
                them is labelled by the set of units that reach it.
            inside: the dimensions that have the units, where sizes do not tell.
            mixes: what all units reach alike reads them; else a norm over all of them is why.
        """
        units = self.axes.fields[path]
        result = Width()
        others = set().union(*(self.dims(other) for other in also)) if also else set()
        if inside is not None:  # what has units of both kinds belongs to both
            inside = {k for k in inside if k not in others or len(self._size(k)) > 1}
        inside = self.dims(path) | (inside or set())
        if not inside:
            raise Underivable(f"No tensor depends on {path[-1]}.")
        result.readers = self.last_readers(inside)
        for tried in range(MOST_ROUNDS):
            mixed = self._label(result, inside, others, units, also, mixes)
            if not mixed or not mixes:
                break
            # What mixes all units reads them; what stands before it may seem to, until it is known.
            last = max(mixed, key=lambda key: self._used(key[0]))
            result.readers.update([last] if tried < MOST_ROUNDS - 1 else mixed)
        return result

    def _label(
        self,
        result: Width,
        inside: set[tuple[int, int]],
        others: set[tuple[int, int]],
        units: int,
        also: Sequence[Path],
        mixes: bool,
    ) -> list[tuple[int, int]]:
        """Set the labels of all dimensions that are no readers; those that mix all units."""
        mixed = []
        result.labels.clear()
        result.coupled = False
        probed = sorted((inside | others) - result.readers)
        single = units <= 16
        masks = _masks(units, single)
        seen = {
            key: np.zeros((len(masks), self.axes.roles[key[0]].shape[key[1]])) for key in probed
        }
        for row, mask in enumerate(masks):
            changed = self._masked(result.readers, mask, units)
            for seed in SEEDS:
                gradients = self.gradients(changed, seed)
                for key in probed:
                    seen[key][row] += self.of_role(gradients, *key)
        ratio = max(1, units // max((self.axes.fields[p] for p in also), default=units))
        for key in probed:
            if single:
                labels, coupled = _single(seen[key], ratio if key in others else 1)
                if key in others and key in inside:
                    labels, coupled = _both(seen[key], ratio)
            else:
                labels, coupled = _spelled(seen[key], units)
            if (labels == MIXED).all():
                mixed.append(key)
                if mixes:
                    continue
            result.labels[key] = labels
            result.coupled |= coupled
        return mixed

    def last_readers(self, inside: set[tuple[int, int]]) -> set[tuple[int, int]]:
        """What reads the units: zero it, and what writes them has no gradient."""
        base = self.gradients({}, 0)
        left = {key for key in inside if self.of_role(base, *key).any()}
        readers: set[tuple[int, int]] = set()
        while left:
            last = max(left, key=lambda key: self._used(key[0]))
            alike = {key for key in left if self._like(key) == self._like(last)}
            zeros = {
                name: np.zeros_like(self.weights[name])
                for place, _ in alike
                for name in self.members[place]
            }
            silent = self.gradients(zeros, 0)
            # A decoder's block that is silent silences the whole encoder.
            stack = self._stack(last[0])
            group = {
                key
                for key in left
                if self._stack(key[0]) == stack and not self.of_role(silent, *key).any()
            }
            readers |= alike
            left -= group | alike
        return readers

    def _like(self, key: tuple[int, int]) -> tuple[str, int]:
        """What a dimension has in common with those of the same tensor in layers of other kinds."""
        return self.axes.roles[key[0]].name, key[1]

    def _stack(self, place: int) -> str:
        """The stack that a role belongs to; all of them belong together where there is one."""
        names = self.axes.names
        return names.place(self.members[place][0])[0] if len(names.prefixes) > 1 else ""

    def _used(self, place: int) -> int:
        """When a role is used, within its layer."""
        role = self.axes.roles[place]
        names = self.members[place]
        layer = role.layers[0] if role.layers else None
        here = self.axes.names.place
        inner = [n for n in names if layer is None or here(n)[1] == layer]
        first = min((self.position.get(n, -1) for n in inner), default=-1)
        stack = here(names[0])[0]
        start = min(
            (p for n, p in self.position.items() if here(n)[:2] == (stack, layer)), default=0
        )
        return first - start

    def _masked(
        self, readers: set[tuple[int, int]], mask: npt.NDArray[np.bool_], units: int
    ) -> Arrays:
        """Readers that read only the units of ``mask``."""
        changed: Arrays = {}
        for place, dim in readers:
            width = self.axes.roles[place].shape[dim]
            if width % units:
                raise Underivable(f"{self.axes.roles[place].name} does not read whole units.")
            kept = np.repeat(mask, width // units)
            for name in self.members[place]:
                array = changed.get(name, self.weights[name])
                shape = [1] * array.ndim
                shape[dim] = width
                changed[name] = array * kept.reshape(shape).astype(array.dtype)
        return changed


def _masks(units: int, single: bool) -> list[npt.NDArray[np.bool_]]:
    """Which units are left: one at a time, or those with a bit of their number set, and not set."""
    numbers = np.arange(units)
    if single:
        return [numbers == unit for unit in range(units)]
    masks = []
    for bit in range(max(1, (units - 1).bit_length())):
        set_here = (numbers >> bit & 1).astype(bool)
        masks += [set_here, ~set_here]
    return masks


def _single(seen: npt.NDArray[np.float64], ratio: int) -> tuple[Labels, bool]:
    """Label of each element from one probe a unit; ``ratio`` units stand for one label."""
    units = len(seen)
    grouped = seen.reshape(units // ratio, ratio, -1).min(axis=1)
    best = grouped.argmax(axis=0)
    largest = grouped.max(axis=0)
    rest = np.where(np.arange(len(grouped))[:, None] == best, 0.0, seen_max(seen, ratio)).max(
        axis=0
    )
    labels = best.astype(np.int64)
    labels[largest < COUPLED * rest] = MIXED
    labels[seen.max(axis=0) == 0] = DEAD
    return labels, bool((rest[labels >= 0] > 0).any())


def seen_max(seen: npt.NDArray[np.float64], ratio: int) -> npt.NDArray[np.float64]:
    """Largest gradient of each group of units."""
    result: npt.NDArray[np.float64] = seen.reshape(len(seen) // ratio, ratio, -1).max(axis=1)
    return result


def _both(seen: npt.NDArray[np.float64], ratio: int) -> tuple[Labels, bool]:
    """Of a dimension with units of both kinds: its own as they are, groups from ``units`` on."""
    alone, coupled = _single(seen, 1)
    shared, _ = _single(seen, ratio)
    return np.where(alone >= 0, alone, np.where(shared >= 0, shared + len(seen), alone)), coupled


def _spelled(seen: npt.NDArray[np.float64], units: int) -> tuple[Labels, bool]:
    """Label of each element from the bits of its unit's number."""
    ones, zeros = seen[0::2], seen[1::2]
    strong = ones > zeros
    weaker, stronger = np.minimum(ones, zeros), np.maximum(ones, zeros)
    labels = (strong.astype(np.int64) << np.arange(len(ones))[:, None]).sum(axis=0)
    labels[(stronger < COUPLED * weaker).any(axis=0)] = MIXED
    labels[(stronger == 0).all(axis=0)] = DEAD
    labels[labels >= units] = MIXED
    return labels, bool((weaker[:, labels >= 0] > 0).any())


def in_sections(labels: Labels, units: int, sections: Mapping[int, int]) -> Labels | None:
    """Labels of a dimension with so many sections of all units in order, and elements that stay
    between them: the arrangement that agrees best with labels that a norm over all units blurs.

    Args:
        sections: elements of a unit -> how many sections have that many.
    """
    lengths, counts = list(sections), tuple(sections.values())
    wholes = [np.repeat(np.arange(units), length) for length in lengths]
    # Place and sections so far -> (agreement, elements of the last part, its section or None).
    best: list[dict[tuple[int, ...], tuple[float, int, int | None]]] = [
        {} for _ in range(len(labels) + 1)
    ]
    best[0][(0,) * len(lengths)] = (0.0, 0, None)
    for at in range(len(labels)):
        for used, (score, _, _) in best[at].items():
            steps: list[tuple[int, tuple[int, ...], float, int | None]] = [
                (at + 1, used, score - 0.5 * (labels[at] >= 0), None)
            ]
            for kind, whole in enumerate(wholes):
                end = at + len(whole)
                if used[kind] < counts[kind] and end <= len(labels):
                    here = labels[at:end]
                    agrees = float((here == whole).sum() - ((here >= 0) & (here != whole)).sum())
                    then = tuple(n + (i == kind) for i, n in enumerate(used))
                    steps.append((end, then, score + agrees, kind))
            for end, then, total, part in steps:
                if then not in best[end] or best[end][then][0] < total:
                    best[end][then] = (total, end - at, part)
    found, at, used = np.full(len(labels), FIXED), len(labels), counts
    if used not in best[at]:
        return None
    while at:
        _, length, last = best[at][used]
        if last is not None:
            found[at - length : at] = wholes[last]
            used = tuple(n - (i == last) for i, n in enumerate(used))
        at -= length
    return found


# -- layouts --------------------------------------------------------------------------------------


def segments_of(
    labels: npt.NDArray[np.int64],
    axes: npt.NDArray[np.int64],
    names: Sequence[str],
    sizes: Mapping[str, int],
) -> list[Segment]:
    """The order of units of a dimension, in words that hold for any sizes.

    Args:
        labels: unit of each element, or FIXED.
        axes: place in ``names`` of its axis.
        names: of axes.
        sizes: units of each axis.

    Raises:
        Underivable: an order that none of the known ones describes.
    """
    runs = _runs(labels, axes, names)
    straight = _sections(runs, sizes)
    if straight is not None:
        return straight
    for over in sorted({axis for axis, _, _ in runs if axis != "fixed"}, key=lambda a: sizes[a]):
        grouped = _grouped(labels, axes, names, sizes, over)
        if grouped is not None:
            return [grouped]
    raise Underivable("Units stand in an order that growkit has no word for.")


Run = tuple[str, int, int]


def _runs(labels: Labels, axes: Labels, names: Sequence[str]) -> list[Run]:
    """(axis, unit, elements) of neighbours that belong together."""
    codes = np.where(labels == FIXED, -1, axes)
    edges = np.flatnonzero((np.diff(labels) != 0) | (np.diff(codes) != 0)) + 1
    return [
        ("fixed" if labels[a] == FIXED else names[axes[a]], int(labels[a]), int(b - a))
        for a, b in zip([0, *edges], [*edges, len(labels)], strict=True)
    ]


def _sections(runs: Sequence[Run], sizes: Mapping[str, int]) -> list[Segment] | None:
    """All units of an axis, then all of the next."""
    result, place = [], 0
    while place < len(runs):
        axis, _unit, length = runs[place]
        if axis == "fixed":
            result.append(Segment((("fixed", length),)))
            place += 1
            continue
        count = sizes[axis]
        if runs[place : place + count] != [(axis, u, length) for u in range(count)]:
            return None
        result.append(Segment(((axis, length),), axis))
        place += count
    return result


def _grouped(
    labels: Labels, axes: Labels, names: Sequence[str], sizes: Mapping[str, int], over: str
) -> Segment | None:
    """For each unit of one axis: it, and its share of the units of the others."""
    groups = sizes[over]
    if len(labels) % groups:
        return None
    pattern: list[tuple[str, int, int]] | None = None
    for group, (part, kinds) in enumerate(
        zip(np.split(labels, groups), np.split(axes, groups), strict=True)
    ):
        found = []
        for axis, unit, length in _runs(part, kinds, names):
            if axis == "fixed" or sizes[axis] % groups:
                return None
            share = sizes[axis] // groups
            found.append((axis, unit - group * share, length))
            if not 0 <= unit - group * share < share:
                return None
        if pattern is not None and found != pattern:
            return None
        pattern = found
    assert pattern is not None
    items: list[tuple[str, int]] = []
    place = 0
    while place < len(pattern):
        axis, unit, length = pattern[place]
        share = sizes[axis] // groups
        if pattern[place : place + share] != [(axis, u, length) for u in range(share)]:
            return None
        items.append((axis, length))
        place += share
    return Segment(tuple(items), over)


def blocks_of(
    segments: Sequence[Segment],
    size: Polynomial,
    fields: Mapping[str, Path],
    numbers: Mapping[Path, int],
) -> list[list[Polynomial]]:
    """Elements of a unit of every item of every segment, as sums of products of config fields.

    Raises:
        Underivable: the parts cannot be told apart.
    """
    items = [(i, j, *item) for i, s in enumerate(segments) for j, item in enumerate(s.items)]
    result: list[list[Polynomial]] = [[{} for _ in s.items] for s in segments]
    left = dict(size)
    for axis in dict.fromkeys(axis for *_, axis, _ in items if axis != "fixed"):
        path = fields[axis]
        mine = [(i, j, length) for i, j, a, length in items if a == axis]
        terms = {key: value for key, value in left.items() if path in key}
        left = {key: value for key, value in left.items() if path not in key}
        block: Polynomial = {}
        for key, value in terms.items():
            rest = list(key)
            rest.remove(path)
            block[tuple(rest)] = value
        lengths = {length for *_, length in mine}
        if len(lengths) == 1 and not any(v % len(mine) for v in block.values()):
            shared = {key: value // len(mine) for key, value in block.items()}
            for i, j, _ in mine:
                result[i][j] = shared
            continue
        for i, j, length in mine:
            part = _terms_of(block, length, numbers)
            if part is None:
                raise Underivable("The parts of a fused tensor cannot be told apart.")
            result[i][j] = part
    for i, j, axis, length in items:
        if axis == "fixed":
            fixed = left if sum(a == "fixed" for *_, a, _ in items) == 1 else None
            fixed = fixed if fixed is not None else _terms_of(left, length, numbers)
            if fixed is None:
                raise Underivable("The fixed parts of a tensor cannot be told apart.")
            result[i][j] = fixed
    for i, j, _, length in items:
        if evaluate(result[i][j], numbers) != length:
            raise Underivable("The size of a unit does not follow from the config.")
    return result


def _terms_of(size: Polynomial, length: int, numbers: Mapping[Path, int]) -> Polynomial | None:
    """One term of the sum, with a whole part of its coefficient, that makes ``length``."""
    for key, value in size.items():
        one = evaluate({key: 1}, numbers)
        if one and length % one == 0 and 0 < length // one <= value:
            return {key: length // one}
    return None
