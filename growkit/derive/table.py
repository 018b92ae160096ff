"""The derived table of a class: what was found on a twin, put into the words of a family."""

from __future__ import annotations

import datetime
import hashlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch

from growkit.derive.axes import (
    EXPERTS,
    HEADS,
    HIDDEN,
    KV_HEADS,
    PER,
    ROUTED,
    WIDTHS,
    Polynomial,
    Role,
    evaluate,
)
from growkit.derive.builder import Builder, Path, Underivable, as_held, integers, token_ids
from growkit.derive.head_size import size_of_heads
from growkit.derive.layer_stacks import Layers, find_layers
from growkit.derive.pictures import hidden_of
from growkit.derive.studied import TIES, Findings
from growkit.derive.widths import (
    DEAD,
    FIXED,
    MIXED,
    Segment,
    Width,
    blocks_of,
    in_sections,
    segments_of,
)
from growkit.families.derived import FORMAT, GROUPS, IDLE, INNER, of_every_layer, width_name
from growkit.families.layer_fields import factor_fields, leaf, with_values
from growkit.verification.model_inputs import (
    arguments,
    cache_keyword,
    can_generate,
    is_encoder_decoder,
)
from growkit.verification.sight import close_eyes, open_eyes

_HEAD_DIM = re.compile(r"head_dim|d_kv")


def class_hash(model: Any) -> str:
    """Hash of the source files that a model class and its config class stand in."""
    digest = hashlib.sha256()
    modules = {type(model).__module__, type(model.config).__module__}
    for name in sorted(modules):
        path = getattr(sys.modules.get(name), "__file__", None)
        digest.update(FilePath(path).read_bytes() if path else name.encode())
    return digest.hexdigest()[:16]


# -- into words -----------------------------------------------------------------------------------


def _name(path: Path, place: Path) -> str:
    """A path from the part that speaks of the layers on, or with "^" from the root on; behind "/"
    the number that the class divides it by."""
    if path[-1].startswith(PER):
        return _name(path[:-1], place) + path[-1]
    if path[: len(place)] == place:
        return ".".join(path[len(place) :])
    return "^" + ".".join(path)


def make_table(builder: Builder, config: Any, found: Findings) -> dict[str, Any]:
    """The table, its operators not proven yet."""
    import transformers

    place = found.layers.place
    inner = leaf(found.values, place)
    kind = kind_of(found.model.model)
    words, tensors = _in_words(found)
    cost = words.cost()
    layers = found.layers
    counts = found.closings.counts | dict.fromkeys(layers.mates, "leading")
    flags, kinds = flags_of(inner, found)
    table: dict[str, Any] = {
        "format": FORMAT,
        "model_type": builder.model_type,
        "class": type(found.model.model).__name__,
        "transformers": transformers.__version__,
        "source": class_hash(found.model.model),
        "date": datetime.date.today().isoformat(),
        "place": list(place),
        "flags": flags,
        "kinds": kinds,
        "defaults": _defaults(builder, config, place, words, found),
        "implied": _implied(builder, found, words),
        "layers": {
            "field": layers.field,
            "counts": counts,
            "period": found.closings.period,
            "lists": _default_lists(builder, place, inner),
            "other": sorted(layers.other),
            **({"sections": list(layers.sections)} if layers.sections else {}),
        },
        "axes": words.axes,
        "numbers": sorted(words.numbers),
        "tied": words.ties(),
        "tensors": tensors,
        "patterns": words.patterns,
        "whole": words.whole,
        "cost": cost,
        "operators": {},
        "carried": words.carried,
        "projected": words.projected(),
        "stream": words.stream(),
        "fills": {
            axis: sorted(_name(path, place) for path in times)
            for axis, times in found.fills.items()
        },
        "copied": list(getattr(found.model.model, "_keys_to_ignore_on_load_unexpected", ()) or ()),
    }
    if rounded := words.rounded():
        table["rounded"] = rounded
    if blocks := as_held(config)[1]:
        table["blocks"] = blocks
        kinds[blocks["list"]] = sorted({*kinds.get(blocks["list"], ()), *blocks["words"]})
    if found.closings.first:
        table["layers"]["first"] = found.closings.first
    if kind != "decoder":
        table["kind"] = kind
    if not place:
        table["spellings"] = spellings(builder.config_class, words)
    if older := older_names(builder, found, words):
        table["older"] = older
    prefix = f"{getattr(found.model.model, 'base_model_prefix', '')}."
    if not place and found.layers.second is None and layered_under(tensors, prefix):
        table["prefix"] = prefix
    if wants_whole_heads(builder, found):
        table["divides"] = type(builder.config(found.values)).__name__
    if layers.second is not None and found.second is not None:
        table["second"] = {
            "field": _name(layers.second.counter, place),
            "place": list(layers.second.place),
            "alone": layers.second.alone,
            "counts": found.second.counts,
            "first": found.second.first,
        }
        if layers.second.alone:  # as T5 has it: as many as the encoder's, where none are stated
            table["implied"].setdefault(layers.second.field, ["product", layers.field])
    if layers.field is None:
        table["layers"]["counted_by"] = next(
            name
            for name, value in inner.items()
            if isinstance(value, list) and len(value) == layers.count
        )
    return table


def spellings(config_class: Any, words: _Words) -> dict[str, str]:
    """Fields that the config class reads under a second name too (``num_experts``)."""
    named = {name for names in words.axes.values() for name in names} | words.numbers
    other = getattr(config_class, "attribute_map", None) or {}
    result = {field: name for name, field in other.items() if field in named and name not in named}
    # A name that the class keeps under another one is written under that (mT5's head_dim: d_kv).
    return result | {name: other[name] for name in named if other.get(name, name) not in named}


def older_names(builder: Builder, found: Findings, words: _Words) -> dict[str, str]:
    """Fields whose older name the config class obeys first where config.json has it (LFM2's
    ``block_ff_dim``): read in its source, and tried."""
    named = {name for names in words.axes.values() for name in names} | words.numbers
    place = found.layers.place

    def part(values: Mapping[str, Any]) -> Any:
        config = builder.config(values)
        for name in place:
            config = getattr(config, name)
        return config

    try:
        source = inspect.getsource(type(part(found.values)))
    except (OSError, TypeError, AttributeError):
        return {}
    result = {}
    for older, field in re.findall(r"kwargs\.pop\(\s*\"(\w+)\", self\.(\w+)\)", source):
        value = leaf(found.values, (*place, field)) if field in named else None
        if isinstance(value, int):
            told = part(with_values(found.values, {(*place, older): 2 * value}))
            if getattr(told, field, None) == 2 * value:
                result[field] = older
    return result


def layered_under(tensors: Sequence[Mapping[str, Any]], prefix: str) -> bool:
    """The names of all tensors of layers begin so: files without it are read by the class too."""
    layered = [entry["name"] for entry in tensors if "{layer}" in entry["name"]]
    return len(prefix) > 1 and all(name.startswith(prefix) for name in layered)


def wants_whole_heads(builder: Builder, found: Findings) -> bool:
    """The class refuses a hidden size that is no multiple of the query heads, though heads have a
    size of their own."""
    if found.stream is None or "query_head" not in found.paths or "query_head" in found.fills:
        return False
    hidden, heads = found.stream.path, found.paths["query_head"][0]
    size, count = (found.axes.fields[path] for path in (hidden, heads))
    odd = size + (count // 2 or 1)
    accepted = []
    for tried in (odd, size + 2 * count) if odd % count else ():
        try:
            builder.shapes(with_values(found.values, {hidden: tried}))
            accepted.append(True)
        except Exception:  # its refusal
            accepted.append(False)
    return accepted == [False, True]


class _Unspeakable(Underivable):
    """A dimension of which these axes cannot be said."""

    def __init__(self, cause: str, axes: Sequence[str]) -> None:
        super().__init__(cause)
        self.axes = list(axes)


def _in_words(found: Findings) -> tuple[_Words, list[dict[str, Any]]]:
    """The tensors in words; an axis for which there are none does not grow, the others do."""
    while True:
        words = _Words(found)
        try:
            return words, words.tensors()
        except _Unspeakable as error:
            if not error.axes:
                raise
            found.drop(error.axes, error.cause)


def kind_of(model: Any) -> str:
    """``decoder``, ``encoder_decoder`` or ``encoder``."""
    if is_encoder_decoder(model):
        return "encoder_decoder"
    return "decoder" if can_generate(model) else "encoder"


def flags_of(inner: Mapping[str, Any], found: Findings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values that the table holds for, and words that lists may hold."""
    flags: dict[str, Any] = {}
    for name, value in inner.items():
        if name in IDLE or "dropout" in name or name.startswith("_"):
            continue
        if isinstance(value, bool | str):
            flags[name] = value
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            flags[f"{name}.rope_type"] = value.get("rope_type")
    place = found.layers.place
    for path in found.axes.structural:
        name = _name(path, place)
        if name == "embedding_size":  # of importance is whether it is the hidden size
            same = inner.get(name) == inner.get("hidden_size")
            flags[name] = ["same" if same else "unlike", "hidden_size"]
        elif name not in found.closings.counts:
            flags[name] = leaf(found.values, path)
    kinds = {
        name: sorted(set(map(str, value)))
        for name, value in inner.items()
        if isinstance(value, list)
        and len(value) == found.layers.count
        and all(isinstance(entry, str) for entry in value)
    }
    return flags, kinds


class _Words:
    """Says a twin's roles in axes of a family."""

    def __init__(self, found: Findings) -> None:
        self.found, self.place = found, found.layers.place
        self.by_path = {path: axis for axis, paths in found.paths.items() for path in paths}
        values, place = found.values, found.layers.place
        model = found.model.model
        hidden = [p for p in found.axes.fields if self._sizes_embedding(p, 1)]
        if _embedding_of(model) is None:  # pixels or sound
            hidden = [p for p in found.axes.fields if HIDDEN.fullmatch(p[-1]) and p[:-1] == place]
        vocab = [p for p in found.axes.fields if self._sizes_embedding(p, 0)]
        self.axes = {
            axis: [_name(path, place) for path in paths] for axis, paths in found.paths.items()
        }
        for axis, paths in (("hidden", hidden), ("vocab", vocab)):
            if paths:
                self.by_path.setdefault(paths[0], axis)
                alike = found.axes.together.get(paths[0], ()) if axis == "hidden" else ()
                self.axes[axis] = [_name(path, place) for path in (paths[0], *alike)]
        for path in found.axes.fields:
            if path == (*place, "head_dim"):
                self.by_path[path], self.axes["head_dim"] = "head_dim", ["head_dim"]
        size = size_of_heads(found)
        if size is not None and "head_dim" not in self.axes and size not in self.by_path:
            self.by_path[size], self.axes["head_dim"] = "head_dim", [_name(size, place)]
        experts = [p for p in found.axes.fields if EXPERTS.fullmatch(p[-1])]
        routed = [p for p, _ in integers(values) if ROUTED.fullmatch(p[-1]) and p[:-1] == place]
        stored = {(str(size), role.name) for role in found.axes.roles for size in role.sizes}
        held = {name for size, name in stored if experts and size == str({(experts[0],): 1})}
        held |= {name for _, name in stored if "{expert}" in name}  # one by one
        if experts and routed and held:
            self.by_path.setdefault(experts[0], "expert")
            self.axes["expert"] = [_name(experts[0], place)]
            self.axes["active_expert"] = [_name(routed[0], place)]
        for axis in found.fills:
            self.by_path[found.width_of(axis)] = width_name(axis)
        self.values = values
        self.kind = kind_of(model)
        self.numbers = {_name(p, place) for times in found.fills.values() for p in times}
        self.patterns: list[dict[str, Any]] = []
        self.whole = sorted(axis for axis, width in found.widths.items() if width.coupled)

    def _sizes_embedding(self, path: Path, dim: int) -> bool:
        role = self._embedding_role()
        if role is None or len(role.sizes) <= dim:
            return False
        size = role.sizes[dim]
        return bool(size) and any(key == (path,) for key in size or {})

    def _embedding_role(self) -> Role | None:
        weight = _embedding_of(self.found.model.model)
        return None if weight is None else self._role_of(weight)

    def _output_role(self) -> Role | None:
        weight = getattr(self.found.model.model.get_output_embeddings(), "weight", None)
        return None if weight is None else self._role_of(weight)

    @cached_property
    def carried(self) -> list[str]:
        """Beginnings of the names of a wrapper's other parts (towers, projectors): copied whole.
        Where its language model has no section of its own, these are what tokens do not reach."""
        if self.found.layers.second or not self.found.wrapped:
            return []
        roles = self.found.axes.roles
        parent = self.found.axes.names.prefix.rstrip(".").rpartition(".")[0] + "."
        own = [role.name for role in (self._embedding_role(), self._output_role()) if role]
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
                self._of_stream(number, dim, size or {})
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

    def ties(self) -> bool:
        """The output projection is the embedding."""
        weight = getattr(self.found.model.model.get_output_embeddings(), "weight", None)
        return weight is not None and weight is _embedding_of(self.found.model.model)

    def _role_of(self, weight: Any) -> Role | None:
        """The role that a parameter of the module is stored under, outside the layers."""
        model = self.found.model
        for role in self.found.axes.roles:
            stored = not role.per_layer and role.instance() not in model.opaque
            if stored and model.state[model.parameter_of(role.instance())] is weight:
                return role
        return None

    def product(self, key: tuple[Path, ...], factor: int) -> list[Any]:
        names = []
        for path in key:
            if path[0] == PER:
                names.append("/" + str(self.product((path[1:],), 1)[1]))
                continue
            axis = self.by_path.get(path)
            if axis is None:
                self.numbers.add(_name(path, self.place))
            names.append(axis or f".{_name(path, self.place)}")
        return [factor, *names]

    def size(self, polynomial: Polynomial) -> list[list[Any]]:
        return [self.product(key, factor) for key, factor in polynomial.items()] or [[0]]

    def tensors(self) -> list[dict[str, Any]]:
        """Every role as an entry of the table, outer tensors that come first in front."""
        embed, head = self._embedding_role(), self._output_role()
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
                "dims": [self.dim(number, role, dim) for dim in range(len(role.shape))],
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

    def stream(self) -> dict[str, Any]:
        """What growth of the hidden size has to know."""
        stream = self.found.stream
        if stream is None:
            return {}
        gains = {self.found.axes.roles[place].name for place in stream.gains}
        inside = [
            role.name
            for role in self.found.axes.roles
            if len(role.shape) == 1 and "norm" in role.name and role.name.endswith("weight")
        ]
        field, eps = stream.eps or (None, 0.0)
        if INNER in self.found.fills:
            return {"sqrt_embedding": False, "norm": {"why": "heads inside its blocks grow along"}}
        norm: dict[str, Any] = {"why": stream.no_padding}
        if not stream.no_padding:
            norm = {"eps_field": field, "eps": eps, "centred": stream.centred}
            if not gains.issuperset(inside):
                norm["shared"] = "norms inside its blocks"
        return {"sqrt_embedding": False, "norm": norm}

    def rounded(self) -> dict[str, Any]:
        """The flag with which the class takes widths as they stand, and for every axis of such a
        width the tensor and dimension that has it and the elements of a unit."""
        widths = {
            axis: path
            for axis, (path, *_) in self.found.paths.items()
            if path in self.found.rounded
        }
        if not widths:
            return {}
        stored: dict[str, list[Any]] = {}
        for axis, path in widths.items():
            for number, dim in sorted(self.found.widths[axis].readers):
                role = self.found.axes.roles[number]
                block = (role.sizes[dim] or {}).get((path,))
                if block and len(role.sizes[dim] or {}) == 1:
                    stored[axis] = [role.name, dim, block]
        flag = next(path for path, value in self.found.rounded.items() if isinstance(value, bool))
        name = _name(flag, self.place)
        return {"flag": name, "exact": leaf(self.found.values, flag), "stored": stored}

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

    def dim(self, number: int, role: Role, dim: int) -> list[Any]:
        """``[reads, segments]`` of one dimension."""
        try:
            return self._said(number, role, dim)
        except _Unspeakable:
            raise
        except Underivable as error:
            raise _Unspeakable(error.cause, self._axes_at(number, dim)) from error

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
        size, width = self.size_of(number, dim), role.shape[dim]
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
            return [0, [["layer", [["layer", self.size(part)]]]]]
        if not (labels >= 0).any():
            if known := self._plain_axis(size):
                return [0, [[known, [[known, [[1]]]]]]]
            if (streamed := self._of_stream(number, dim, size)) is not None:
                return streamed
            if self.hidden_unseen:
                return [0, [["", [["fixed", [["stored", role.name, dim]]]]]]]
            return [0, [["", [["fixed", self.size(size)]]]]]
        counts = {axis: self.found.axes.fields[p[0]] for axis, p in self.found.paths.items()}
        fields = {axis: paths[0] for axis, paths in self.found.paths.items()}
        segments: list[Segment] = segments_of(labels, codes, names, counts)
        blocks = blocks_of(segments, size, fields, self.found.axes.fields)
        said = [
            [
                s.over,
                [[axis, self.size(block)] for (axis, _), block in zip(s.items, b, strict=True)],
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
        role = self.found.axes.roles[number]
        units = self.found.axes.fields[self.found.paths[axis][0]]
        units_of = {
            key for key in self.size_of(number, dim) or {} if self.found.paths[axis][0] in key
        }
        partly = axis in self.found.fills and len(units_of) < len(self.size_of(number, dim) or {})
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
        size = self.size_of(number, dim) or {}
        shared = bool(target) and any(self.found.paths[target][0] in key for key in size)
        own = any(self.found.paths[axis][0] in key for key in size)
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
        size, width = self.size_of(number, dim) or {}, self.found.axes.roles[number].shape[dim]
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
            if alike and self.size_of(other, there) == self.size_of(number, dim):
                if (labels < 0).any() or axis in self.found.fills:
                    labels = self._with_fixed(other, there, axis, labels)
                if labels is not None and not (labels == DEAD).any():
                    return labels
        return None

    def _with_fixed(self, number: int, dim: int, axis: str, mine: Any) -> Any:
        """Elements that all units use alike (a key/value head that all query heads share), if the
        size has such a part: they stay."""
        path, fields = self.found.paths[axis][0], self.found.axes.fields
        size = self.size_of(number, dim) or {}
        if all(path in key for key in size):
            return None
        sections = {
            evaluate({key: 1}, fields) // fields[path]: count
            for key, count in size.items()
            if path in key
        }
        return in_sections(mine, fields[path], sections)

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

    def _plain_axis(self, size: Polynomial) -> str | None:
        """The axis of a dimension that has just its units (vocabulary, experts)."""
        if len(size) != 1:
            return None
        ((key, factor),) = size.items()
        axis = self.by_path.get(key[0]) if len(key) == 1 and factor == 1 else None
        return axis if axis in ("vocab", "expert") else None

    def _of_stream(self, number: int, dim: int, size: Polynomial) -> list[Any] | None:
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
        return [reads, [["hidden", [["hidden", [self.product(tuple(rest), 1)]]]]] * factor]

    @cached_property
    def hidden_unseen(self) -> bool:
        """Whether the hidden size could not be changed by itself (Zamba), so that the twin's stands
        in sizes as a number. The model's own is another one, which its files have to say."""
        sizes = [dim or {} for role in self.found.axes.roles for dim in role.sizes]
        path, hidden = hidden_of(self.found.values, self.found.layers.place)
        return {(): hidden} in sizes and not any(path in key for size in sizes for key in size)

    def _hidden_alone(self, size: Polynomial) -> bool:
        ((key, factor),) = size.items() if len(size) == 1 else ((((),), 0),)
        return len(key) == 1 and factor == 1 and self.by_path.get(key[0]) == "hidden"

    def cost(self) -> dict[str, Any]:
        """What attention costs: elements of a cache a layer and token, and width of the heads."""
        found = self.found
        attended: list[list[Any]] = [[0]]
        cached: list[list[Any]] = [[0]]
        width = found.widths.get("query_head")
        if width is not None:
            readers = sorted(width.readers, key=lambda key: len(found.axes.roles[key[0]].layers))
            for place, dim in readers[:1]:
                attended = self.size(found.axes.roles[place].sizes[dim] or {})
            kv = found.paths.get("kv_head", [None])[0]
            seen = set()
            for place, dim in sorted(width.labels):
                size = found.axes.roles[place].sizes[dim] or {}
                matrix = len(found.axes.roles[place].shape) == 2
                terms = {key: value for key, value in size.items() if kv in key}
                if kv and terms and matrix and found.axes.roles[place].name not in seen:
                    seen.add(found.axes.roles[place].name)
                    cached = [*cached, *self.size(terms)]
            if not kv and (left := self._key_values(width)):
                cached = left
            elif not kv:
                cached = [[2 * product[0], *product[1:]] for product in attended]
        elif (kept := self._kept_by_a_cache()) is not None:
            cached = self.size(kept)
            attended = self.size(self._of_all_heads(kept))
        return {"attended": attended, "kv_elements": cached}

    def _key_values(self, width: Width) -> list[list[Any]]:
        """Sizes of key/value heads that all query heads share, where there are such."""
        path = self.found.paths["query_head"][0]
        for number, dim in sorted(width.labels):
            size = self.size_of(number, dim) or {}
            left = {key: value for key, value in size.items() if path not in key}
            if left and len(left) < len(size):
                return self.size(left)
        return []

    def _kept_by_a_cache(self) -> Polynomial | None:
        """Elements of a cache a layer and token where no axis of heads was found: as measured, in
        the fields that change it."""
        builder, stack = self.found.model.builder, self.found.layers.second or self.found.layers
        if self.kind == "encoder" or not (base := cached_elements(builder, self.values)):
            return None
        top: list[Path] = []
        below: list[Path] = []
        sizes = dict(integers(self.values))
        own = [p for p in sizes if p[:-1] == stack.place]
        for path in own:
            if any(p.fullmatch(path[-1]) for p in (HIDDEN, HEADS, KV_HEADS, _HEAD_DIM)):
                found = cached_elements(builder, with_values(self.values, {path: 2 * sizes[path]}))
                if found in (2 * base, base // 2):
                    (top if found == 2 * base else below).append(path)
        wide = [path for path in own if HIDDEN.fullmatch(path[-1])]
        heads = [path for path in own if HEADS.fullmatch(path[-1])]
        kept = base // max(1, evaluate({tuple(top): 1}, sizes))
        told = below or any(_HEAD_DIM.fullmatch(path[-1]) for path in top)
        # A class that refuses another width of heads: it is that of all over their number.
        whole = wide and heads and kept % (sizes[wide[0]] // sizes[heads[0]]) == 0
        if whole and not told and wide[0] not in top:
            top, below = [*top, wide[0]], [heads[0]]
        key = (*sorted(top), *((PER, *path) for path in sorted(below)))
        one = evaluate({key: 1}, sizes)
        return {key: base // one} if one and base % one == 0 else None

    def _of_all_heads(self, kept: Polynomial) -> Polynomial:
        """Width of the query heads, from the elements that a cache keeps of key/value heads."""
        result: Polynomial = {}
        for key, value in kept.items():
            paths = [path for path in key if path[0] != PER]
            for number, path in enumerate(paths):
                if KV_HEADS.fullmatch(path[-1]):
                    near = leaf(self.values, path[:-1])
                    heads = next((n for n in near if HEADS.fullmatch(n)), path[-1])
                    paths[number] = (*path[:-1], heads)
            paths += [path for path in key if path[0] == PER]
            result[tuple(paths)] = value // 2
        return result


def cached_elements(builder: Builder, values: Mapping[str, Any]) -> int | None:
    """Elements that a cache keeps of a token in the first layer that has one, as a forward pass
    fills it; None where the class keeps none."""
    try:
        model = builder.build(values)
        given = {**arguments(model, token_ids(model)), "use_cache": True}
        with torch.no_grad():
            result = model(**given)
        cache: Any = getattr(result, cache_keyword(model), None)
        layers = getattr(cache, "self_attention_cache", cache).layers
        kept = next(layer for layer in layers if getattr(layer, "keys", None) is not None)
        read = given["decoder_input_ids"] if "decoder_input_ids" in given else given["input_ids"]
        length = read.shape[1]
        parts = (kept.keys, kept.values)
        if any(part.shape[-2] != length for part in parts):
            return None
        return sum(part[0].numel() for part in parts) // length
    except Exception:  # a class without a cache, or with one of its own kind
        return None


def _embedding_of(model: Any) -> Any:
    """The embedding matrix; None of a model that reads no tokens."""
    try:
        return getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None


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


def _defaults(
    builder: Builder, config: Any, place: Path, words: _Words, found: Findings
) -> dict[str, Any]:
    """What the class puts for fields that a config need not state."""
    try:
        plain, _ = as_held(builder.config_class())
    except Exception:  # a class without defaults
        return {}
    inner = leaf(plain, place)
    if not isinstance(inner, Mapping):
        return {}
    used = {name for names in words.axes.values() for name in names} | words.numbers
    layers = found.layers
    used |= {layers.field or "", *found.closings.counts, *layers.mates, *layers.sections}
    used.add(TIES)
    used |= {name.partition(PER)[0] for name in used}
    used |= {part for name in used for part in factor_fields(name) or ()}
    flags, _ = flags_of(leaf(found.values, place), found)
    used |= {*flags, *GROUPS}
    kept = {}
    for name in sorted(used):
        of_whole = name.startswith("^")
        value = leaf(plain if of_whole else inner, tuple(name.removeprefix("^").split(".")))
        value = value if name in found.closings.counts else of_every_layer(value)
        factor = isinstance(value, float) and WIDTHS.fullmatch(name)
        if isinstance(value, bool | int | str) or factor or name in found.closings.counts:
            kept[name] = value
    if place and isinstance(plain.get("tie_word_embeddings"), bool):
        kept["^tie_word_embeddings"] = plain["tie_word_embeddings"]
    return kept


def _implied(builder: Builder, found: Findings, words: _Words) -> dict[str, Any]:
    """Fields that the class computes from others where they are null: found by leaving them out."""
    place = found.layers.place
    result: dict[str, Any] = {}
    counted = [n for names in words.axes.values() for n in names if not factor_fields(n)]
    paths = {(*place, *name.split(".")) for name in counted}
    paths |= {(*place, *name.split(".")) for name in words.numbers}
    numbers = {p: v for p, v in integers(found.values) if p[: len(place)] == place}
    for path in sorted(paths):
        if path not in numbers:
            continue
        shapes = None
        for bare in (with_values(found.values, {path: None}), _without(found.values, path)):
            try:
                shapes = builder.shapes(bare)
            except Exception:  # it has to be stated
                continue
            break
        if shapes is None:
            continue
        for rule in _rules(path, numbers):
            kind, *names = rule
            parts = [n if isinstance(n, int) else numbers[n] for n in names]
            value = parts[0] // parts[1] if kind == "quotient" else int(np.prod(parts))
            try:
                same = builder.shapes(with_values(found.values, {path: value})) == shapes
                distinct = value == numbers[path] or same
            except Exception:
                continue
            if same and distinct:
                result[_name(path, place)] = [
                    kind,
                    *(n if isinstance(n, int) else _name(n, place) for n in names),
                ]
                break
    return result


def _without(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A config that is silent about a field."""
    result = with_values(values, {})
    leaf(result, path[:-1]).pop(path[-1], None)
    return result


def _rules(path: Path, numbers: Mapping[Path, int]) -> list[tuple[Any, ...]]:
    """What a class may make of a number that is not there."""
    parent = path[:-1]
    hidden = [
        p for p in numbers if p[-1] in ("hidden_size", "d_model", "n_embd") and p[:-1] == parent
    ]
    heads = [p for p in numbers if HEADS.fullmatch(p[-1]) and p[:-1] == parent]
    if KV_HEADS.fullmatch(path[-1]):
        return [("product", h) for h in heads] + [("product", 1)]
    if "head_dim" in path[-1] or path[-1] == "kv_channels":
        return [("quotient", h, n) for h in hidden for n in heads]
    if WIDTHS.fullmatch(path[-1]):
        return [("product", factor, h) for h in hidden for factor in (4, 2, 3, 1)]
    return []


def _default_lists(builder: Builder, place: Path, inner: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Lists of layer kinds that the class makes where a config has none, as one period."""
    result: dict[str, list[Any]] = {}
    try:
        plain, _ = as_held(builder.config_class())
    except Exception:  # a class without defaults
        return result
    layers = find_layers(builder, plain)
    whole = leaf(plain, place)
    if not isinstance(whole, Mapping):
        return result
    for name, value in whole.items():
        if isinstance(inner.get(name, 0), int) or not isinstance(value, list):
            continue
        if len(value) == layers.count:
            for period in range(1, min(16, len(value)) + 1):
                if all(value[i] == value[i % period] for i in range(len(value))):
                    result[name] = value[:period]
                    break
    return result
