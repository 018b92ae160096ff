"""The size of heads: which tensors make keys, what is rotated, and in which terms it is tried.

New channels stand at the end of every head; new channels of keys are zero, and the old ones make up
for the softmax scale (:mod:`growkit.surgery.operators.head_dim`). What makes queries and what makes
keys is a pair of tensors of which one may be doubled and the other halved; values pair with the
output projection likewise. A class that norms what they make shows no such pair. What the position
encoding allows and whether the scale depends on the size of a head is tried: the proof decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from growkit.derive.axes import PER
from growkit.derive.builder import Builder, Path, token_ids
from growkit.derive.stored import Arrays, StoredModel, relative_error
from growkit.derive.studied import Findings
from growkit.families.base import Family
from growkit.families.derived.family import read_with
from growkit.families.head_dim_rules import HEAD_NORM, ROTARY
from growkit.families.layer_fields import leaf, with_values
from growkit.verification.model_inputs import outputs

SAME = 1e-5
HEADS = ("query_head", "kv_head")
NO_KEYS = "no pair of tensors that make its queries and keys was found"
_KEY = re.compile(r"(^|.*[._])(k|key|keys|key_proj|k_proj)")
# Names under which config classes read the part of a head that is rotated.
_FACTORS = ("partial_rotary_factor", "rotary_pct", "rotary_percent", "rope_pct")


def size_of_heads(found: Findings) -> Path | None:
    """The field that says how wide a head is, where all of its tensors have that width."""
    terms = _widths_of_heads(found)
    paths = {path for term in terms for path in term}
    one = len(paths) == 1 and all(len(term) == 1 for term in terms)
    return next(iter(paths)) if one else None


def _widths_of_heads(found: Findings) -> set[tuple[Path, ...]]:
    """Products that a head's part of a dimension is made of."""
    width = found.widths.get("query_head")
    if width is None or "query_head" in found.fills:
        return set()
    counted = [found.paths[axis][0] for axis in HEADS if axis in found.paths]
    result: set[tuple[Path, ...]] = set()
    for number, dim in {*width.readers, *width.labels}:
        for key in found.axes.roles[number].sizes[dim] or {}:
            rest = list(key)
            for path in counted:
                if path in rest:
                    rest.remove(path)
                    break
            else:
                continue
            if rest and not any(path[0] == PER for path in rest):
                result.add(tuple(rest))
    return result


def why_not(table: Mapping[str, Any], found: Findings) -> str:
    """Why the size of its heads is not even tried, or empty."""
    if "query_head" not in table["axes"]:
        unsaid = "its attention heads were not told apart, or it has none"
        return found.failures.get("query_head", unsaid).rstrip(".")
    if "query_head" in table["fills"] or "head_dim" in table["axes"]:
        return ""
    several = sorted({path[-1] for term in _widths_of_heads(found) for path in term})
    if len(several) > 1:
        return f"its heads have several sizes ({', '.join(several)})"
    return "no field of its config says how large its heads are"


@dataclass
class _Group:
    """What one module makes of heads: part of its matrix, and of its bias."""

    places: list[tuple[str, int, str, int]] = field(default_factory=list)
    masks: dict[tuple[str, int], list[npt.NDArray[np.bool_]]] = field(default_factory=dict)
    matrix: bool = False
    reads: bool = False


def _groups(family: Family, sizes: Mapping[str, int]) -> dict[tuple[str, str, int], _Group]:
    """(module, axis, part) -> the group."""
    found: dict[tuple[str, str, int], _Group] = {}
    for tensor in family.tensors:
        for place, dim in enumerate(tensor.dims):
            units = dim.layout(sizes)
            if dim.normed or units.block != sizes["head_dim"] or not {*units.axes} & {*HEADS}:
                continue
            for code, axis in enumerate(units.axes):
                for part in sorted(set(units.part[units.axis == code])) if axis in HEADS else ():
                    here = np.repeat((units.axis == code) & (units.part == part), units.block)
                    key = tensor.name.rpartition(".")[0], axis, int(part)
                    group = found.setdefault(key, _Group())
                    group.places.append((tensor.role, place, axis, int(part)))
                    group.masks.setdefault((tensor.name, place), []).append(here)
                    group.matrix |= len(tensor.dims) > 1
                    group.reads |= dim.consumes
    return {key: group for key, group in found.items() if group.matrix}


class _Scaling:
    """A twin with parts of its tensors multiplied."""

    def __init__(self, found: Findings, model: StoredModel) -> None:
        self.found, self.model = found, model
        model.write(found.weights)
        self.base = model.logits()

    def changes(self, *scaled: tuple[_Group, float]) -> bool:
        """The logits differ."""
        weights: Arrays = dict(self.found.weights)
        for group, factor in scaled:
            for name, array in self.found.weights.items():
                template = self.found.axes.names.role_name(name)[1]
                for (tensor, dim), masks in group.masks.items():
                    here = [m for m in masks if tensor == template and array.shape[dim] == len(m)]
                    if here:
                        shape = [1] * array.ndim
                        shape[dim] = len(here[0])
                        by = np.where(here[0], factor, 1.0).reshape(shape)
                        weights[name] = (weights[name] * by).astype(array.dtype)
        self.model.write(weights)
        return not relative_error(self.model.logits(), self.base) <= SAME


@dataclass
class Attention:
    """What makes keys.

    Attributes:
        keys: (role, dimension, axis, part) of everything that does.
        normed: roles that make what norms inside a head read, which have the epsilon of the
            residual stream's norms.
        why: why there are no keys to name.
    """

    keys: list[tuple[str, int, str, int]] = field(default_factory=list)
    normed: list[str] = field(default_factory=list)
    why: str = ""


def find_attention(table: Mapping[str, Any], builder: Builder, found: Findings) -> Attention:
    """Which tensors make keys, and which of them a norm reads."""
    if why := why_not(table, found):
        return Attention(why=why)
    config = {**found.values, "model_type": table["model_type"]}
    family = read_with({**table, "operators": {}}, config, found.weights)
    groups = _groups(family, family.sizes_of(config, list(found.weights)))
    try:
        return _told(table, builder, found, groups)
    finally:
        found.model.write(found.weights)


def _told(
    table: Mapping[str, Any],
    builder: Builder,
    found: Findings,
    groups: Mapping[tuple[str, str, int], _Group],
) -> Attention:
    makers = {key: group for key, group in groups.items() if not group.reads}
    scaling = _Scaling(found, _with_epsilons(builder, found, 1e-14))
    silent = [key for key, group in makers.items() if not scaling.changes((group, 2.0))]
    pairs = [
        (one, other)
        for one, other in combinations([key for key in makers if key not in silent], 2)
        if not scaling.changes((makers[one], 2.0), (makers[other], 0.5))
    ]
    taken = [key for pair in pairs for key in pair]
    if pairs and len(set(taken)) == len(taken):
        return Attention([place for pair in pairs for place in makers[_key_of(*pair)].places])
    eps = table["stream"].get("norm", {}).get("eps_field")
    normed = _reading(found, builder, eps, groups, silent) if eps else []
    return Attention([], normed, HEAD_NORM if silent else NO_KEYS)


def _reading(
    found: Findings,
    builder: Builder,
    eps: str,
    groups: Mapping[tuple[str, str, int], _Group],
    silent: Sequence[tuple[str, str, int]],
) -> list[str]:
    """Roles that make what norms inside a head read whose epsilon is this field: one of 1 tells
    their size. What the output projection makes up for (values), a norm behind it reads."""
    coarse = _Scaling(found, _with_epsilons(builder, found, 1.0, eps))
    readers = [group for group in groups.values() if group.reads]

    def inside(maker: _Group) -> bool:
        pairs = ([(maker, 2.0), (reader, 0.5)] for reader in readers)
        return coarse.changes((maker, 2.0)) and all(coarse.changes(*pair) for pair in pairs)

    roles = [groups[key].places for key in silent if inside(groups[key])]
    return sorted({role for places in roles for role, *_ in places})


def _with_epsilons(builder: Builder, found: Findings, size: float, only: str = "") -> StoredModel:
    """The twin with this epsilon in all of its norms, or in those that have this field."""
    place, inner = found.layers.place, leaf(found.values, found.layers.place)
    fields = [n for n, v in inner.items() if isinstance(v, float) and "eps" in n and v < 0.1]
    changed = {(*place, name): size for name in ([only] if only else fields)}
    try:
        return StoredModel(builder, with_values(found.values, changed))
    except Exception:  # a refusal of the class
        return found.model


def _key_of(one: tuple[str, str, int], other: tuple[str, str, int]) -> tuple[str, str, int]:
    """Which of two parts makes the keys; between heads of one number either would do."""
    if one[1] != other[1]:
        return one if one[1] == "kv_head" else other
    named = [key for key in (one, other) if _KEY.fullmatch(key[0])]
    return named[0] if len(named) == 1 else other


def trials(builder: Builder, found: Findings) -> Iterator[dict[str, Any]]:
    """Contents of ``table["heads"]`` to try."""
    factors: list[tuple[str, float] | None] = [None]
    if turns(builder, found):
        factors.append(_factor(builder, found))
    for rotary in factors:
        for scaled in (True, False):
            yield {"scaled": scaled, "rotary": rotary}


def _angles(values: Mapping[str, Any], path: Path = ()) -> Iterator[Path]:
    """Paths of the bases of rotary frequencies."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _angles(value, (*path, name))
        elif name in ("rope_theta", "rotary_emb_base") and isinstance(value, int | float):
            yield (*path, name)


def turns(builder: Builder, found: Findings) -> bool:
    """Heads are rotated: another base of the frequencies gives other logits."""
    inner = leaf(found.values, found.layers.place)
    paths = [(*found.layers.place, *path) for path in _angles(inner)]
    changed = {path: 3.0 * leaf(found.values, path) for path in paths}
    if not changed:
        return False
    found.model.write(found.weights)
    try:
        other: Any = builder.build(with_values(found.values, changed))
        other.load_state_dict(found.model.model.state_dict())
        with torch.no_grad():
            logits = outputs(other, token_ids(other)).float()
        return relative_error(logits, found.model.logits()) > SAME
    except Exception:  # a refusal of the class
        return True


def _factor(builder: Builder, found: Findings) -> tuple[str, float]:
    """Field of the part of a head that is rotated, beside ``rope_parameters``, and its default."""
    place = found.layers.place
    read = [field for field in _FACTORS if _is_read(builder, place, field)]
    try:
        plain: Any = leaf(builder.config_class().to_dict(), place) or {}
    except Exception:  # a class without defaults
        plain = {}
    rope = plain.get("rope_parameters") or {}
    default = rope.get("partial_rotary_factor", plain.get((read or _FACTORS)[0]))
    return (read or _FACTORS)[-1 if len(read) > 1 else 0], float(default or 1.0)


def _is_read(builder: Builder, place: Path, name: str) -> bool:
    """The config class makes the factor of this field."""
    stated: Any = {name: 0.375}
    for part in reversed(place):
        stated = {part: stated}
    try:
        told = leaf(builder.config_class(**stated).to_dict(), place)
        return bool((told.get("rope_parameters") or {}).get("partial_rotary_factor") == 0.375)
    except Exception:  # a refusal of the class
        return False


def reason(builder: Builder, found: Findings, tried: str) -> str:
    """Why no trial was proven."""
    return ROTARY if turns(builder, found) else f"it could not be proven: {tried}"
