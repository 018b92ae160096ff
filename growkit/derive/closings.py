"""Depth: which tensors of an inserted layer have to be zero, found by trying.

A copy of a layer is inserted behind it, the config's lists moved along, and the whole copy is set
to zero: then it must be an identity, or no choice of zeros makes it one. Its tensors are given back
one after another, in the order in which the forward pass uses them, while the logits stay equal;
what breaks them stays closed. So the last thing before the residual stream is closed and nothing in
front of it. A norm that follows a projection is tried at gain zero, stored as 0 or (where the class
multiplies by 1 + w) as -1, before the projection itself is closed: behind such a norm its first
gradient would be amplified by 1 / sqrt(eps).

A post-norm layer normalises the residual stream itself, so that zeros make no identity of it. But
what is normalised already stays as it is under norms with gains of one, but for their epsilon: the
norm that ends the layer in front becomes such a one, and the inserted layer ends with its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from growkit.derive.axes import Axes, Role
from growkit.derive.builder import Builder, Underivable, Values, said_by
from growkit.derive.layer_stacks import Layers, layer_kinds
from growkit.derive.stored import Arrays, StoredModel, relative_error
from growkit.families.derived.form import layers_fed
from growkit.families.layer_fields import leaf, move_counts, with_values

SAME = 2e-6
ALIKE = 3e-5  # of norms of what is normalised: but for one epsilon


@dataclass
class Closings:
    """How depth grows.

    Attributes:
        values: (role's place in the list of roles) -> value that closes it: 0, -1, or 1 of a scale
            of the residual stream.
        counts: config field that counts layers of a kind -> ``leading`` or ``trailing``; that the
            class divides by the root of their number -> ``root``.
        period: layers that have to be inserted together, after a multiple of themselves; 1: any.
        first: layers at the beginning that are of a kind of their own and are not copied.
        passed: role -> what stands in the layer in front, whose own numbers the inserted one has:
            gain and bias of the norm that ends a post-norm layer.
        refusal: why depth cannot grow, or empty.
    """

    values: dict[int, float] = field(default_factory=dict)
    passed: dict[int, float] = field(default_factory=dict)
    counts: dict[str, str] = field(default_factory=dict)
    period: int = 1
    first: int = 0
    refusal: str = ""


@dataclass
class Inserted:
    """The twin with identity layers to be, not closed yet.

    Attributes:
        grown: the longer model.
        weights: its file, every inserted layer a copy.
        new: (inserted layer, layer that it copies).
    """

    grown: StoredModel
    weights: Arrays
    new: list[tuple[int, int]]


class LayerInsertion:
    """Inserts copies of layers into a twin.

    Args:
        builder, values, layers: of the twin.
        axes: its roles.
        weights: its file.
        logits: what it computes.
        fresh: its file as the class begins it.
    """

    def __init__(
        self,
        builder: Builder,
        values: Values,
        layers: Layers,
        axes: Axes,
        weights: Arrays,
        logits: torch.Tensor,
        fresh: Arrays,
    ) -> None:
        self.builder, self.values, self.layers = builder, values, layers
        self.axes, self.weights, self.logits = axes, weights, logits
        self.fresh = fresh
        self.keeps_ones = False
        self.passed: dict[int, float] = {}
        self.same = SAME

    def closed(self, found: Inserted) -> dict[int, float]:
        """Every role of the new layers, with the value that closes it."""
        roles = {role for _, source in found.new for role in self.roles_of(source)}
        roles -= self.passed.keys()
        return {role: float(self.keeps_ones and self._begins_as_one(role)) for role in roles}

    def ends(self, layer: int) -> list[dict[int, float]]:
        """Gain and bias of norms that may end a layer, as plain norms have them."""
        roles = self.axes.roles
        result = []
        for gain in (r for r in self.roles_of(layer) if self._begins_as_one(r)):
            stem = roles[gain].name.rpartition(".")[0]
            alike = [
                other
                for other in self.roles_of(layer)
                if roles[other].name.rpartition(".")[0] == stem
                and roles[other].shape == roles[gain].shape
            ]
            result.append({other: float(other == gain) for other in alike})
        return result[::-1]

    def _begins_as_one(self, place: int) -> bool:
        """A vector that multiplies: a gain, or a scale of the residual stream itself."""
        array = self.fresh.get(self.axes.roles[place].instance())
        return array is not None and array.ndim < 2 and bool((array == 1).all())

    def insert(
        self, sources: Sequence[int], new: Sequence[int], counts: dict[str, str]
    ) -> Inserted:
        """The model whose layers are made of these.

        Raises:
            Underivable: the class makes another model of such a config.
        """
        config = self.layers.moved(self.values, sources)
        inner = leaf(self.values, self.layers.place)
        moved = move_counts(inner, counts, self.layers.count, sources)
        config = with_values(config, {(*self.layers.place, k): v for k, v in moved.items()})
        try:
            grown = StoredModel(self.builder, config)
        except Exception as error:  # a refusal of the class
            raise Underivable(f"The class refuses the longer config ({said_by(error)}).") from error
        weights = self._weights(grown, sources)
        return Inserted(grown, weights, [(place, sources[place]) for place in new])

    def _weights(self, grown: StoredModel, sources: Sequence[int]) -> Arrays:
        weights: Arrays = {}
        for name, shape in grown.shapes.items():
            if name in grown.opaque:
                continue
            layer, rest = self.axes.names.split(name)
            origin = name
            if layer is not None:
                if layer >= len(sources):
                    raise Underivable(f"The longer model has an unexpected tensor {name!r}.")
                origin = f"{self.axes.names.prefix}{sources[layer]}.{rest}"
            source = self.weights.get(origin)
            if source is None:
                raise Underivable("A new layer would be of another kind than the layer it copies.")
            weights[name] = source
            if source.shape != shape:
                weights[name] = by_layer(source, shape, self.layers.count, sources)
        expected = set()
        for layer, source_layer in enumerate(sources):
            prefix = f"{self.axes.names.prefix}{source_layer}."
            for name in self.weights:
                if name.startswith(prefix):
                    expected.add(f"{self.axes.names.prefix}{layer}.{name[len(prefix) :]}")
        if not expected <= weights.keys():
            raise Underivable("A new layer would be of another kind than the layer it copies.")
        return weights

    def roles_of(self, layer: int) -> list[int]:
        """Places of the roles that a layer of the twin has."""
        return [
            i
            for i, role in enumerate(self.axes.roles)
            if layer in role.layers and role.name.startswith(self.axes.names.prefix)
        ]

    def members(self, role: Role, layer: int, names: Iterable[str]) -> list[str]:
        """Names of the tensors of a role in a layer of the longer model."""
        template = role.name
        return [
            name
            for name in names
            if (parts := self.axes.names.role_name(name))[0] == layer and parts[1] == template
        ]


def by_layer(source: Any, shape: Sequence[int], old: int, sources: Sequence[int]) -> Any:
    """A table with a part for each layer, after the layers have moved."""
    for dim, (before, after) in enumerate(zip(source.shape, shape, strict=True)):
        if before != after:
            if before % old or after * old != before * len(sources):
                break
            parts = np.split(source, old, axis=dim)
            return np.concatenate([parts[layer] for layer in sources], axis=dim)
    raise Underivable("A tensor outside the layers changes with their number.")


def find_closings(insertion: LayerInsertion, order: Sequence[str], dead: set[int]) -> Closings:
    """What closes an inserted layer, and where layers may be inserted.

    Args:
        insertion: of the twin.
        order: file names of the twin in the order of the forward pass.
        dead: roles without a gradient in the twin itself.
    """
    layers = insertion.layers.count
    if insertion.layers.shared:
        return Closings(refusal="Its layers share their weights, so that none can be added")
    chosen, places, failures = _counted(insertion)
    result = Closings(counts=chosen)
    if failures and layers > 1:  # a first layer that is unlike all others
        again = _counted(insertion, first=1)
        if not again[2]:
            chosen, places, failures = again
            result = Closings(counts=chosen, first=1)
    if failures:
        whole = [*range(layers)] * 2
        try:
            found = insertion.insert(whole, range(layers, 2 * layers), chosen)
            _close_all(insertion, found, chosen)
        except Underivable as error:
            result.refusal = f"{failures[0]} ({error.cause})" if failures else error.cause
            result.refusal = failures[0]
            return result
        result.period = layers
        trials = [found]
    else:
        trials = places
    position = {name: place for place, name in enumerate(order)}
    each: list[dict[int, float]] = []
    for found in trials:
        try:
            each.append(_given_back(insertion, found, position))
        except Underivable as error:
            result.refusal = error.cause
            return result
        for role, value in each[-1].items():
            known = result.values.get(role, value)
            result.values[role] = value if value > 0 else min(value, known)
    result.passed = insertion.passed
    lacking = _lacking(insertion, trials, result.values, dead)
    if lacking and result.period == 1 and _split(insertion, trials, each, result.values, dead):
        lacking = _lacking(insertion, trials, result.values, dead)
    if lacking:
        result.refusal = f"No gradient reaches {lacking!r} of a new layer in two steps."
    return result


def _lacking(
    insertion: LayerInsertion, trials: Sequence[Inserted], closed: dict[int, float], dead: set[int]
) -> str:
    """A tensor of new layers without a gradient in two steps, or empty."""
    for found in trials:
        if names := _without_gradient(insertion, found, closed, dead):
            return names[0]
    return ""


def _split(
    insertion: LayerInsertion,
    trials: Sequence[Inserted],
    each: Sequence[dict[int, float]],
    closed: dict[int, float],
    dead: set[int],
) -> bool:
    """Tell apart what closes layers of one kind and not of another: a norm before a block here and
    behind it there. True if there was anything to tell."""
    shapes = {name: array.shape for name, array in insertion.weights.items()}
    kinds = layer_kinds(shapes, insertion.layers, insertion.values) or []
    closing: dict[int, set[Any]] = {}
    leaving: dict[int, set[Any]] = {}
    for found, mine in zip(trials, each, strict=True):
        for _, source in found.new:
            for place in insertion.roles_of(source):
                (closing if place in mine else leaving).setdefault(place, set()).add(kinds[source])
    roles, told = insertion.axes.roles, False
    for place in [p for p in closing if leaving.get(p, set()) - closing[p]]:
        role = roles[place]
        shut = tuple(layer for layer in role.layers if kinds[layer] in closing[place])
        roles.append(replace(role, layers=shut))
        role.layers = tuple(layer for layer in role.layers if layer not in shut)
        closed[len(roles) - 1] = closed.pop(place)
        if place in dead:
            dead.add(len(roles) - 1)
        told = True
    return told


def _counted(
    insertion: LayerInsertion, first: int = 0
) -> tuple[dict[str, str], list[Inserted], list[str]]:
    """Rules for fields that count layers, the insertions that they allow, and what fails."""
    inner = leaf(insertion.values, insertion.layers.place)
    layers = insertion.layers.count
    counters = [
        name
        for name, value in inner.items()
        if isinstance(value, int)
        and not isinstance(value, bool)
        and 0 < value <= layers
        and name != insertion.layers.field
        and ("layer" in name or "first" in name or "dense" in name or "index" in name)
    ]
    best: tuple[dict[str, str], list[Inserted], list[str]] | None = None
    rules: list[dict[str, str]] = [{}]
    rules += [{name: rule} for name in counters for rule in ("leading", "trailing")]
    rules += [
        {name: "root"}
        for name, value in inner.items()
        if isinstance(value, int | float) and ("scale" in name or "depth" in name)
        if not isinstance(value, bool)
    ]
    for rule in rules:
        works, fails = [], []
        for layer in _places(insertion):
            sources = [*range(layer + 1), max(layer, first), *range(layer + 1, layers)]
            try:
                found = insertion.insert(sources, [layer + 1], rule)
                _close_all(insertion, found, rule)
                works.append(found)
            except Underivable as error:
                fails.append(error.cause)
        if best is None or len(works) > len(best[1]):
            best = rule, works, fails
        if not fails:
            break
    assert best is not None
    return best


def _places(insertion: LayerInsertion) -> list[int]:
    """First and last layer of every kind, behind those that features of images are added behind."""
    shapes = {name: array.shape for name, array in insertion.weights.items()}
    kinds = layer_kinds(shapes, insertion.layers, insertion.values) or []
    last = {kind: place for place, kind in enumerate(kinds)}
    first = {kind: place for place, kind in reversed(list(enumerate(kinds)))}
    fed = min(insertion.layers.count, layers_fed(insertion.values)) - 1
    return sorted({place for place in (*first.values(), *last.values()) if place >= fed})


def _close_all(insertion: LayerInsertion, found: Inserted, counts: dict[str, str]) -> None:
    """Raise unless new layers of zeros are identities."""
    for ones in dict.fromkeys((insertion.keeps_ones, True)):
        insertion.keeps_ones = ones
        if error_with(insertion, found, insertion.closed(found)) <= insertion.same:
            return
    known, behind = insertion.passed, all(layer == source + 1 for layer, source in found.new)
    for passed in ([known] if known else insertion.ends(found.new[0][1])) if behind else ():
        insertion.passed = passed
        error = error_with(insertion, found, insertion.closed(found))
        if error <= ALIKE:
            insertion.same = max(insertion.same, 1.5 * error)
            return
    insertion.keeps_ones, insertion.passed = False, known
    raise Underivable(
        "No zeros make a new layer an identity (a norm over the residual stream itself, or a "
        "scale that depends on the depth)."
    )


def error_with(insertion: LayerInsertion, found: Inserted, closed: dict[int, float]) -> float:
    """Relative error of the logits with these roles of the new layers closed."""
    weights = closed_weights(insertion, found, closed)
    found.grown.write(weights)
    return relative_error(found.grown.logits(), insertion.logits)


def closed_weights(insertion: LayerInsertion, found: Inserted, closed: dict[int, float]) -> Arrays:
    """The longer model's file with these roles of the new layers closed."""
    weights = dict(found.weights)
    buffers = _buffers(found.grown)
    for layer, source in found.new:
        for place in insertion.roles_of(source):
            if place not in closed:
                continue
            role = insertion.axes.roles[place]
            for name in insertion.members(role, layer, found.weights):
                if name not in buffers:
                    weights[name] = np.full_like(found.weights[name], closed[place])
        for place, value in insertion.passed.items():
            for name in insertion.members(insertion.axes.roles[place], layer - 1, found.weights):
                weights[name] = np.full_like(found.weights[name], value)
    return weights


def _buffers(model: StoredModel) -> set[str]:
    """Names of file tensors that no optimizer trains."""
    return {
        name
        for name in model.shapes
        if name in model.opaque
        or not isinstance(model.state[model.parameter_of(name)], torch.nn.Parameter)
    }


def _given_back(
    insertion: LayerInsertion, found: Inserted, position: dict[str, int]
) -> dict[int, float]:
    """Role -> closing value of what has to stay closed."""
    sources: dict[int, list[int]] = {}
    for source in dict.fromkeys(source for _, source in found.new):
        for role in insertion.roles_of(source):
            sources.setdefault(role, []).append(source)
    begins: dict[int, int] = {}
    for place, layers in sources.items():
        for layer in layers:
            when = position.get(insertion.axes.roles[place].instance(layer), -1)
            if when >= 0:
                begins[layer] = min(when, begins.get(layer, when))

    def used(place: int) -> int:
        """When a role is used within its layer, the latest of the layers that have it."""
        role = insertion.axes.roles[place]
        when = [(position.get(role.instance(layer), -1), layer) for layer in sources[place]]
        return max((at - begins[layer] for at, layer in when if at >= 0), default=-1)

    start = insertion.closed(found)
    ordered = sorted(start, key=lambda place: (used(place) < 0, used(place)))
    closed = {place: start[place] for place in ordered}
    for step, place in enumerate(ordered):
        value = closed.pop(place)
        if error_with(insertion, found, closed) <= insertion.same:
            continue
        # A norm behind it, whose gain is 1 + w?
        later = [
            p
            for p in ordered[step + 1 :]
            if p in closed and len(insertion.axes.roles[p].shape) == 1
        ]
        for norm in later[:2]:
            if closed[norm] == 0.0:
                closed[norm] = -1.0
                if error_with(insertion, found, closed) <= insertion.same:
                    break
                closed[norm] = 0.0
        else:
            closed[place] = value
    return closed


def _without_gradient(
    insertion: LayerInsertion, found: Inserted, closed: dict[int, float], dead: set[int]
) -> list[str]:
    """Tensors of new layers that get no gradient in two steps of gradient descent."""
    weights = closed_weights(insertion, found, closed)
    reached: set[str] = set()
    buffers = _buffers(found.grown)
    for seed in (0, 1):
        found.grown.write(weights)
        gradients = found.grown.gradients(seed)
        for name, gradient in gradients.items():
            size = float(np.abs(gradient).max(initial=0.0))
            if size:
                reached.add(name)
                step = 1e-2 * gradient / size
                weights[name] = weights[name] if name in buffers else weights[name] - step
    lacking = []
    for layer, source in found.new:
        for place in insertion.roles_of(source):
            role = insertion.axes.roles[place]
            members = insertion.members(role, layer, found.weights)
            if place not in dead and not reached & set(members):
                lacking.append(role.name)
    return lacking
