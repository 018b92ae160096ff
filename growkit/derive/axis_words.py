"""Sizes in the words of a family: axes for the fields of a config."""

from __future__ import annotations

from typing import Any

from growkit.derive.axes import EXPERTS, HIDDEN, PER, ROUTED, Polynomial, Role
from growkit.derive.builder import Path, integers
from growkit.derive.head_size import size_of_heads
from growkit.derive.studied import Findings
from growkit.families.derived.form import width_name
from growkit.verification.model_inputs import can_generate, is_encoder_decoder


class AxisWords:
    """Axes of a family for the fields of a twin, and sizes in their words."""

    def __init__(self, found: Findings) -> None:
        self.found, self.place = found, found.layers.place
        self.by_path = {path: axis for axis, paths in found.paths.items() for path in paths}
        values, place = found.values, found.layers.place
        model = found.model.model
        hidden = [p for p in found.axes.fields if self._sizes_embedding(p, 1)]
        if embedding_of(model) is None:  # pixels or sound
            hidden = [p for p in found.axes.fields if HIDDEN.fullmatch(p[-1]) and p[:-1] == place]
        vocab = [p for p in found.axes.fields if self._sizes_embedding(p, 0)]
        self.axes = {
            axis: [path_name(path, place) for path in paths] for axis, paths in found.paths.items()
        }
        for axis, paths in (("hidden", hidden), ("vocab", vocab)):
            if paths:
                self.by_path.setdefault(paths[0], axis)
                alike = found.axes.together.get(paths[0], ()) if axis == "hidden" else ()
                self.axes[axis] = [path_name(path, place) for path in (paths[0], *alike)]
        for path in found.axes.fields:
            if path == (*place, "head_dim"):
                self.by_path[path], self.axes["head_dim"] = "head_dim", ["head_dim"]
        size = size_of_heads(found)
        if size is not None and "head_dim" not in self.axes and size not in self.by_path:
            self.by_path[size], self.axes["head_dim"] = "head_dim", [path_name(size, place)]
        experts = [p for p in found.axes.fields if EXPERTS.fullmatch(p[-1])]
        routed = [p for p, _ in integers(values) if ROUTED.fullmatch(p[-1]) and p[:-1] == place]
        stored = {(str(size), role.name) for role in found.axes.roles for size in role.sizes}
        held = {name for size, name in stored if experts and size == str({(experts[0],): 1})}
        held |= {name for _, name in stored if "{expert}" in name}  # one by one
        if experts and routed and held:
            self.by_path.setdefault(experts[0], "expert")
            self.axes["expert"] = [path_name(experts[0], place)]
            self.axes["active_expert"] = [path_name(routed[0], place)]
        for axis in found.fills:
            self.by_path[found.width_of(axis)] = width_name(axis)
        self.values = values
        self.kind = kind_of(model)
        self.numbers = {path_name(p, place) for times in found.fills.values() for p in times}
        self.whole = sorted(axis for axis, width in found.widths.items() if width.coupled)

    def _sizes_embedding(self, path: Path, dim: int) -> bool:
        role = self.embedding_role()
        if role is None or len(role.sizes) <= dim:
            return False
        size = role.sizes[dim]
        return bool(size) and any(key == (path,) for key in size or {})

    def embedding_role(self) -> Role | None:
        weight = embedding_of(self.found.model.model)
        return None if weight is None else self.role_of(weight)

    def output_role(self) -> Role | None:
        weight = getattr(self.found.model.model.get_output_embeddings(), "weight", None)
        return None if weight is None else self.role_of(weight)

    def ties(self) -> bool:
        """The output projection is the embedding."""
        weight = getattr(self.found.model.model.get_output_embeddings(), "weight", None)
        return weight is not None and weight is embedding_of(self.found.model.model)

    def role_of(self, weight: Any) -> Role | None:
        """The role that a parameter of the module is stored under, outside the layers."""
        model = self.found.model
        for role in self.found.axes.roles:
            stored = not role.per_layer and role.instance() not in model.opaque
            if stored and model.state[model.parameter_of(role.instance())] is weight:
                return role
        return None

    def product(self, key: tuple[Path, ...], factor: int) -> list[Any]:
        """A product of fields as a table has it; fields without an axis are noted as numbers."""
        names = []
        for path in key:
            if path[0] == PER:
                names.append("/" + str(self.product((path[1:],), 1)[1]))
                continue
            axis = self.by_path.get(path)
            if axis is None:
                self.numbers.add(path_name(path, self.place))
            names.append(axis or f".{path_name(path, self.place)}")
        return [factor, *names]

    def size_of(self, number: int, dim: int) -> Polynomial | None:
        """The size of a dimension; where heads fill the hidden size, in heads."""
        size = self.found.axes.roles[number].sizes[dim]
        for axis, times in self.found.fills.items():
            width = self.found.widths[axis]
            if size and self.found.stream and (number, dim) in {*width.readers, *width.labels}:
                size = self._in_heads(size, axis, (self.found.stream.path, *times))
        return size

    def _in_heads(self, size: Polynomial, axis: str, whole: tuple[Path, ...]) -> Polynomial:
        """A size in which heads take the place of what they fill."""
        path = self.found.paths[axis][0]
        result: Polynomial = {}
        for key, factor in size.items():
            if set(whole) <= set(key):
                rest = list(key)
                for part in whole:
                    rest.remove(part)
                if (PER, *path) in rest:
                    rest.remove((PER, *path))
                else:
                    rest.append(path)
                key = tuple(sorted([*rest, self.found.width_of(axis)]))
            result[key] = result.get(key, 0) + factor
        return result

    def size(self, polynomial: Polynomial) -> list[list[Any]]:
        """A size as a table has it."""
        return [self.product(key, factor) for key, factor in polynomial.items()] or [[0]]


def path_name(path: Path, place: Path) -> str:
    """A path from the part that speaks of the layers on, or with "^" from the root on; behind "/"
    the number that the class divides it by."""
    if path[-1].startswith(PER):
        return path_name(path[:-1], place) + path[-1]
    if path[: len(place)] == place:
        return ".".join(path[len(place) :])
    return "^" + ".".join(path)


def kind_of(model: Any) -> str:
    """``decoder``, ``encoder_decoder`` or ``encoder``."""
    if is_encoder_decoder(model):
        return "encoder_decoder"
    return "decoder" if can_generate(model) else "encoder"


def embedding_of(model: Any) -> Any:
    """The embedding matrix; None of a model that reads no tokens."""
    try:
        return getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
