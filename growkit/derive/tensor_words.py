"""The tensors of a twin, as entries of a table."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from growkit.derive.axes import Role
from growkit.derive.axis_words import AxisWords
from growkit.derive.dimension_words import DimensionWords
from growkit.derive.layer_stacks import Layers
from growkit.derive.studied import Findings
from growkit.families.layer_fields import leaf
from growkit.verification.sight import close_eyes, open_eyes


class TensorWords:
    """Says the tensors of a twin in the axes of ``words``.

    Attributes:
        patterns: which layers have a tensor, as far as tensors have been said.
    """

    def __init__(self, words: AxisWords) -> None:
        self.words, self.found, self.place = words, words.found, words.place
        self.dimensions = DimensionWords(words)
        self.patterns: list[dict[str, Any]] = []

    def tensors(self) -> list[dict[str, Any]]:
        """Every role as an entry of the table, outer tensors that come first in front."""
        embed, head = self.words.embedding_role(), self.words.output_role()
        names: dict[str, int] = {}
        result = []
        roles = self.found.axes.roles
        carried, outer, gains = self.carried, self._final_norm(), self._gains()
        for number, role in enumerate(roles):
            if role.name.startswith(tuple(carried)):
                continue
            same = names[role.name] = names.get(role.name, 0) + 1
            word = outer.get(number, "lm_head" if role is head else "")
            word = "embed" if role is embed else word
            entry: dict[str, Any] = {
                "role": word or role.name + (f"#{same}" if same > 1 else ""),
                "name": role.name,
                "dims": [self.dimensions.dim(number, role, dim) for dim in range(len(role.shape))],
            }
            closes = self.found.closings.values.get(number)
            if closes is not None:
                entry["closes"] = closes
            elif gains.get(number):
                entry["gain_offset"] = gains[number]
            if number in self.found.closings.passed:
                entry["passes_on"] = self.found.closings.passed[number]
            init = self._init(role)
            if init != "normal":
                entry["init"] = init
            fused = len(role.shape) > 2 and entry["dims"][0][1][0][0] == "expert"
            if "{expert}" in role.name or (fused and "expert" in role.name):
                entry["of_experts"] = True
            stack = self.stack(role)
            if stack is not self.found.layers:
                entry["stack"] = "decoder_layer"
            if role.per_layer and len(role.layers) < stack.count:
                entry["layers"] = self.pattern(role)
            result.append(entry)
        return result

    @cached_property
    def carried(self) -> list[str]:
        """Beginnings of the names of a wrapper's other parts (towers, projectors): copied whole.
        Where its language model has no section of its own, these are what tokens do not reach."""
        if self.found.layers.second or not self.found.wrapped:
            return []
        roles = self.found.axes.roles
        parent = self.found.axes.names.prefix.rstrip(".").rpartition(".")[0] + "."
        own = [
            role.name for role in (self.words.embedding_role(), self.words.output_role()) if role
        ]
        text = [*own, parent]
        if not self.place:
            unread = self._unread()
            own = [r.name for n, r in enumerate(roles) if r.per_layer or n not in unread]
            text, parent = own, "\0"
        found: list[str] = []
        for name in (role.name for role in roles if not role.per_layer):
            if name in own or name.startswith(parent):
                continue
            parts = name.split(".")
            starts = [".".join(parts[:n]) + "." for n in range(1, len(parts))]
            alone = [p for p in starts if not any(other.startswith(p) for other in text)]
            if alone and alone[0] not in found:
                found.append(alone[0])
        return found

    def _unread(self) -> set[int]:
        """Roles that get no gradient from token ids alone."""
        model, sight = self.found.model, self.found.model.builder.sight
        if sight is None:
            return self.found.dead
        model.write(self.found.weights)
        close_eyes(model.model)
        try:
            reached = {n for n, gradient in model.gradients().items() if gradient.any()}
        finally:
            open_eyes(model.model, sight)
        alive = {self.found.axes.names.role_name(name)[1] for name in reached}
        return {n for n, role in enumerate(self.found.axes.roles) if role.name not in alive}

    def projected(self) -> list[list[Any]]:
        """Of the tensors that are carried along, those with a dimension of the residual stream, as
        [pattern of names, dimensions or null]. Those of a list of modules that are alike are said
        at once, however many a model has."""
        if self.found.stream is None:
            return []
        carried = tuple(self.carried) or ("\0",)
        said: dict[str, list[Any]] = {}
        for number, role in enumerate(self.found.axes.roles):
            if not role.name.startswith(carried):
                continue
            said[role.name] = [
                self.dimensions.of_stream(number, dim, size or {})
                if (number, dim) in self.found.stream.inside
                else None
                for dim, size in enumerate(role.sizes)
            ]
        alike: dict[str, list[str]] = {}
        for name in said:
            alike.setdefault(re.sub(r"\.\d+\.", ".#.", name), []).append(name)
        result: list[list[Any]] = []
        for pattern, names in alike.items():
            same = len(names) > 1 and all(said[name] == said[names[0]] for name in names)
            exact = re.escape(pattern).replace(r"\#", r"\d+") if same else ""
            for name in names[:1] if same else names:
                if any(dim is not None for dim in said[name]):
                    result.append([exact or re.escape(name), said[name]])
        return result

    def _gains(self) -> dict[int, float]:
        """Role -> what is added to the gain of a norm over the residual stream."""
        return self.found.stream.gains if self.found.stream else {}

    def _final_norm(self) -> dict[int, str]:
        """The words for what ends the residual stream."""
        stream = self.found.stream
        if stream is None or stream.final is None:
            return {}
        roles = self.found.axes.roles
        stem = roles[stream.final].name.rpartition(".")[0]
        biases = [b for b in stream.biases if roles[b].name.rpartition(".")[0] == stem]
        return {stream.final: "final_norm", **dict.fromkeys(biases, "final_norm_bias")}

    def stack(self, role: Role) -> Layers:
        """The stack that a role belongs to."""
        layers, names = self.found.layers, self.found.axes.names
        second = layers.second and role.name.startswith(names.prefixes[1])
        return layers.second if second and layers.second else layers

    def _init(self, role: Role) -> str:
        """How the class begins such a tensor."""
        model = self.found.model
        if role.instance() in model.opaque:
            return "zeros"
        array = self.found.fresh[role.instance()]
        if (array == 1).all():
            return "ones"
        return "zeros" if not array.any() else "normal"

    def pattern(self, role: Role) -> int:
        """Number of the pattern of layers that have this role."""
        same_name = [r for r in self.found.axes.roles if r.name == role.name]
        second = self.stack(role) is not self.found.layers
        rule = layer_rule(self.found, role.layers, second=second)
        entry: dict[str, Any] = {"name": role.instance(-7).replace("-7", "{layer}"), "rule": rule}
        if second:
            entry["stack"] = "decoder_layer"
        if len(same_name) > 1:
            entry["shape_rule"] = True
        if entry not in self.patterns:
            self.patterns.append(entry)
        return self.patterns.index(entry)


def layer_rule(
    found: Findings, layers: tuple[int, ...], *, second: bool = False
) -> list[Any] | None:
    """What of the config tells these layers of the twin from the others.

    ``second``: they are layers of the decoder's stack.
    """
    stack = found.layers.second if second and found.layers.second else found.layers
    closings = found.second if second and found.second else found.closings
    inner, count = leaf(found.values, stack.place), stack.count
    if closings.first and layers in ((0,), tuple(range(1, count))):
        return ["first" if layers == (0,) else "rest", 1]
    for name, value in inner.items():
        if isinstance(value, list) and len(value) == count and name not in stack.other:
            words = sorted({str(value[layer]) for layer in layers})
            if tuple(i for i in range(count) if str(value[i]) in words) == layers:
                return ["list", name, words]
    for name, rule in closings.counts.items():
        if rule == "root":
            continue
        value = inner[name]
        if layers == tuple(range(min(value, count))):
            return ["below", name]
        if layers == tuple(range(min(value, count), count)):
            return ["from", name]
    for name, value in inner.items():
        if isinstance(value, list) and value and all(type(entry) is int for entry in value):
            inside = tuple(layer for layer in range(count) if layer in value)
            if inside and inside == layers:
                return ["index", name]
            if inside and tuple(i for i in range(count) if i not in inside) == layers:
                return ["not index", name]
    if closings.period == count > 1:
        return ["period", count, list(layers)]
    return None
