"""What the sizes of a file's tensors depend on: one number of the config is changed at a time.

Every dimension becomes a sum of products of config fields (``4 + 2 * heads * head_dim``), found at
the corners of the cube of its fields: exact for whatever is linear in each of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from typing import Any

from growkit.derive.builder import (
    Builder,
    Path,
    Underivable,
    Values,
    check_forward,
    integers,
    said_by,
)
from growkit.derive.layer_stacks import Layers, stack_prefix, towers_beside
from growkit.derive.stored import saved
from growkit.families.layer_fields import leaf, with_values

Shape = tuple[int, ...]
Polynomial = dict[tuple[Path, ...], int]
MOST_FIELDS = 6
PER = "/"  # before a path: divided by its number

HEADS = re.compile(r"(num_)?(attention_heads|n_heads?|heads)|decoder_attention_heads|n_heads?")
KV_HEADS = re.compile(r"num_key_value_heads|num_kv_heads|n_head_kv|kv_n_heads|num_query_groups")
WIDTHS = re.compile(
    r".*(intermediate|ffn|inner|d_ff|dff|dim_ff|feed_forward|mlp_dim|mlp_hidden|mlp_ratio).*"
    r"|hidden_dim"
)
HIDDEN = re.compile(r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|dim|embed_dim")
HEAD_WIDTH = re.compile(r".*(head_dim|d_head|headdim|head_size)|d_kv")
EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")


ROUTED = re.compile(r".*(experts_per_tok(en)?|top_?k(_experts)?|moe_k)")


@dataclass
class Role:
    """Tensors of the file that differ in nothing but their layer and their expert.

    Attributes:
        name: with ``{layer}`` and ``{expert}``.
        shape: in the twin.
        layers: layers of the twin that have it; empty outside the stack.
        sizes: what each dimension depends on; None where no sum of products fits.
        depends: fields that each dimension depends on.
        by_layer: dimensions of a tensor outside the layers that have a part for each of them.
    """

    name: str
    shape: Shape
    layers: tuple[int, ...] = ()
    sizes: list[Polynomial | None] = field(default_factory=list)
    depends: list[list[Path]] = field(default_factory=list)
    by_layer: set[int] = field(default_factory=set)

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    def instance(self, layer: int | None = None, expert: int = 0) -> str:
        """The name of one of them."""
        chosen = self.layers[0] if layer is None and self.layers else layer
        return self.name.replace("{layer}", str(chosen)).replace("{expert}", str(expert))


class Names:
    """Takes layer and expert out of the names of a file's tensors."""

    def __init__(self, names: Sequence[str], layers: Layers, expert_counts: set[int]) -> None:
        stacks = [layers, layers.second] if layers.second else [layers]
        found = [stack_prefix(names, stack.count, stack.part) for stack in stacks]
        prefixes = [prefix for prefix in found if prefix is not None]
        if len(prefixes) < len(stacks):
            raise Underivable("The file has no list of as many layers as the config says.")
        self.prefix, self.counts = prefixes[0], expert_counts
        self.prefixes = prefixes
        self._experts = self._expert_places(names)

    def of_second(self) -> Names:
        """The same for the second stack."""
        other = copy.copy(self)
        other.prefix = self.prefixes[1]
        return other

    def place(self, name: str) -> tuple[str, int | None, str]:
        """(prefix of the stack, layer or None, the rest of the name)."""
        for prefix in self.prefixes:
            if name.startswith(prefix):
                number, _, rest = name[len(prefix) :].partition(".")
                if number.isdigit():
                    return prefix, int(number), rest
        return "", None, name

    def _expert_places(self, names: Sequence[str]) -> set[tuple[str, str]]:
        """(before, after) of numbers that count experts, as they stand inside a layer."""
        found: dict[tuple[str, str], set[int]] = {}
        for name in names:
            rest = self.place(name)[2]
            for match in re.finditer(r"(?<=\.)\d+(?=\.)", rest):
                key = rest[: match.start()], rest[match.end() :]
                found.setdefault(key, set()).add(int(match.group()))
        return {
            key
            for key, numbers in found.items()
            if len(numbers) in self.counts and numbers == set(range(len(numbers)))
            if "expert" in key[0]
        }

    def split(self, name: str) -> tuple[int | None, str]:
        """(layer of the stack that is looked at, or None; the rest of the name)."""
        if name.startswith(self.prefix):
            number, _, rest = name[len(self.prefix) :].partition(".")
            if number.isdigit():
                return int(number), rest
        return None, name

    def role_name(self, name: str) -> tuple[int | None, str, int | None]:
        """(layer, name with placeholders, expert)."""
        prefix, layer, rest = self.place(name)
        expert = None
        for match in re.finditer(r"(?<=\.)\d+(?=\.)", rest):
            if (rest[: match.start()], rest[match.end() :]) in self._experts:
                expert = int(match.group())
                rest = rest[: match.start()] + "{expert}" + rest[match.end() :]
                break
        return layer, rest if layer is None else f"{prefix}{{layer}}.{rest}", expert


@dataclass
class Axes:
    """What the twin's file is made of.

    Attributes:
        roles: its tensors.
        fields: config fields that sizes depend on -> value in the twin.
        together: field -> other fields that have to change with it.
        structural: fields of which the set of tensors depends.
        names: reads names.
        fixed: numbers that sizes are divided by, and that the class does not let change.
        bound: fields whose product the class wants to be another one's (heads x head size): each
            was changed together with the last of them, which no size is said in.
    """

    roles: list[Role]
    fields: dict[Path, int]
    together: dict[Path, tuple[Path, ...]]
    structural: list[Path]
    names: Names
    fixed: frozenset[Path] = frozenset()
    bound: tuple[Path, ...] = ()

    def role(self, name: str) -> list[Role]:
        return [role for role in self.roles if role.name == name]


class _Variations:
    """Shapes of the file under changed configs, made once each."""

    def __init__(self, builder: Builder, values: Values) -> None:
        self.builder, self.values = builder, values
        self.objection = ""
        self.slack: tuple[Path, int] = ((), 1)
        self._known: dict[frozenset[tuple[Path, int]], dict[str, Shape] | None] = {}

    def shapes(self, changes: Mapping[Path, int]) -> dict[str, Shape] | None:
        """Shapes of the file; None where the class objects."""
        key = frozenset(changes.items())
        if key not in self._known:
            try:
                model = self.builder.build(with_values(self.values, changes))
                self._known[key] = {n: tuple(a.shape) for n, a in saved(model).items()}
            except Exception as error:  # a refusal of the class
                self._known[key], self.objection = None, said_by(error)
        return self._known[key]

    def joined(self, changes: Iterable[Mapping[Path, int]]) -> dict[Path, int]:
        """Several changes at once; of the number that follows from others, all of its factors."""
        result: dict[Path, int] = {}
        slack, before = self.slack
        for change in changes:
            for path, size in change.items():
                both = path == slack and path in result
                result[path] = result[path] * size // before if both else size
        return result

    def module_shapes(self, changes: Mapping[Path, int]) -> dict[str, Shape] | None:
        try:
            return dict(self.builder.shapes(with_values(self.values, changes)))
        except Exception:  # a refusal of the class
            return None


def find_axes(
    builder: Builder, values: Values, layers: Layers, along: Mapping[Path, tuple[Path, ...]]
) -> Axes:
    """Roles of the twin's file, and what their dimensions depend on.

    Args:
        builder, values, layers: of the twin.
        along: field -> fields that say the same number again.
    """
    variations = _Variations(builder, values)
    base = variations.shapes({})
    if base is None:
        raise Underivable(f"The twin cannot be saved ({variations.objection}).")
    plain = variations.module_shapes({})
    assert plain is not None
    counters = {layers.counter, layers.second.counter if layers.second else layers.counter}
    counters |= {(*layers.place, name) for name in layers.mates}
    other: dict[Path, int] = {}
    together: dict[Path, tuple[Path, ...]] = dict(along)
    again = {path for paths in along.values() for path in paths}
    structural: list[Path] = []
    # Of a wrapper's other parts nothing grows: their tensors are copied as they are.
    places = [stack.place for stack in (layers, layers.second) if stack is not None]
    beside = towers_beside(values)
    numbers = {
        p: v
        for p, v in integers(values)
        if p not in counters | again and v > 0 and p[0] not in beside
        if len(p) == 1 or any(p[: len(place)] == place for place in places)
    }
    refused = []
    for path, value in numbers.items():
        for tried in (2 * value, value + 1, 3 * value):
            change = _with_partners(path, {path: tried}, together, numbers)
            found = variations.module_shapes(change)
            if found is not None:
                break
        named = (HEADS, HIDDEN) if found not in (None, plain) else ()
        named = (HEAD_WIDTH, *named) if found is not None else ()
        if any(name.fullmatch(path[-1]) for name in named):
            found = found if _computes(builder, with_values(values, change)) else None
        if found is None:
            refused.append(path)
        elif found != plain:
            if {n.count(".") and n for n in found} != set(plain) and not _counts_experts(
                plain, found
            ):
                structural.append(path)
            other[path] = tried
    for path in refused:
        partners = [p for p in numbers if p != path and numbers[p] == numbers[path]]
        partners += [p for p in numbers if KV_HEADS.fullmatch(p[-1]) or HEADS.fullmatch(p[-1])]
        for partner in dict.fromkeys(partners):
            if partner == path or not HEADS.fullmatch(path[-1]):
                continue
            joint = {path: 2 * numbers[path], partner: 2 * numbers[partner]}
            found = variations.module_shapes(joint)
            if found in (None, plain):
                continue
            if _computes(builder, with_values(values, joint)):
                other[path], together[path] = 2 * numbers[path], (partner,)
                break
    for path in [p for p in numbers if HIDDEN.fullmatch(p[-1])][:1]:
        if path in other and path not in structural:
            continue
        # An embedding of another width than the stream has a projection of its own.
        for partner in (p for p in numbers if p != path and numbers[p] == numbers[path]):
            joint = {path: 2 * numbers[path], partner: 2 * numbers[partner]}
            found = variations.module_shapes(joint)
            if not found or set(found) != set(plain) or found == plain:
                continue
            if _computes(builder, with_values(values, joint)):
                other[path], together[path] = 2 * numbers[path], (partner,)
                other.pop(partner, None)
                structural = [p for p in structural if p not in (path, partner)]
                break
    stuck = [path for path in refused if path not in other]
    slack, bound = _bound(builder, variations, values, numbers, stuck)
    other |= {path: 2 * numbers[path] for path in bound}
    other = {path: size for path, size in other.items() if path not in structural}
    experts = {numbers[path] for path in other if EXPERTS.fullmatch(path[-1])}
    names = Names(list(base), layers, experts)
    changes = {path: _with_partners(path, other, together, numbers) for path in other}
    changes |= {path: {path: other[path], slack: size} for path, size in bound.items()}
    variations.slack = slack, numbers.get(slack, 1)
    for path, divisor in _divided(base, variations, changes, numbers).items():
        part = (*path, f"{PER}{divisor}")
        numbers[part], other[part] = numbers[path] // divisor, other.pop(path) // divisor
        changes[part] = changes.pop(path)
    signatures = _signatures(base, variations, changes, names)
    roles = _roles(base, signatures, names)
    fixed = [path for path in refused if path not in other and HEADS.fullmatch(path[-1])]
    for role in roles:
        role.sizes = [
            _polynomial(role, dim, variations, changes, other, numbers, fixed)
            for dim in range(len(role.shape))
        ]
    _find_parts_of_layers(builder, values, layers, roles)
    used = {path for role in roles for size in role.sizes if size for key in size for path in key}
    used |= {path[1:] for path in used if path[0] == PER}
    fields = {path: numbers[path] for path in [*other, *fixed] if path in used}
    last = (slack,) if bound else ()
    return Axes(roles, fields, together, structural, names, frozenset(fixed), (*bound, *last))


def _bound(
    builder: Builder,
    variations: _Variations,
    values: Values,
    numbers: Mapping[Path, int],
    stuck: Sequence[Path],
) -> tuple[Path, dict[Path, int]]:
    """Fields that the class lets change only together with one other (hidden x expand = heads x
    head size): that one, a head's size where there is such, and what it has to be beside each."""
    plain = variations.module_shapes({}) or {}
    best: tuple[Path, dict[Path, int]] = ((), {})
    for slack in sorted(stuck, key=lambda path: not HEAD_WIDTH.fullmatch(path[-1])):
        found: dict[Path, int] = {}
        for path in stuck:
            for size in (2 * numbers[slack], numbers[slack] // 2):
                joint = {path: 2 * numbers[path], slack: size}
                shapes = variations.module_shapes(joint) if size and path != slack else None
                if shapes is None or shapes == plain or set(shapes) != set(plain):
                    continue
                if _computes(builder, with_values(values, joint)):
                    found[path] = size
                    break
        if len(found) > max(1, len(best[1])):
            best = slack, found
    return best


def name_of(path: Path) -> str:
    """The field's own name; a path may end in the number that the class divides it by."""
    return path[-2] if path[-1].startswith(PER) else path[-1]


def _divided(
    base: Mapping[str, Shape],
    variations: _Variations,
    changes: Mapping[Path, Mapping[Path, int]],
    numbers: Mapping[Path, int],
) -> dict[Path, int]:
    """Widths of which the class makes a part alone (half of them each for a gate and a value)."""
    found: dict[Path, int] = {}
    for path, change in changes.items():
        if not WIDTHS.fullmatch(path[-1]) or len(change) != 1:
            continue
        step = change[path] - numbers[path]
        shapes = variations.shapes(change) or {}
        for name, shape in base.items():
            for before, after in zip(shape, shapes.get(name, ()), strict=False):
                part = Fraction(after - before, step).denominator
                if 1 < part <= 4 and numbers[path] % part == change[path] % part == 0:
                    found[path] = max(part, found.get(path, 1))
    return found


def _find_parts_of_layers(
    builder: Builder, values: Values, layers: Layers, roles: Sequence[Role]
) -> None:
    """Tensors outside the layers whose size changes with their number."""
    last = layers.count - 1
    try:
        longer = saved(builder.build(layers.moved(values, [*range(layers.count), last])))
    except Exception:  # a refusal of the class: depth will say so
        return
    for role in roles:
        found = longer.get(role.name)
        if not role.per_layer and found is not None and len(found.shape) == len(role.shape):
            for dim, (before, after) in enumerate(zip(role.shape, found.shape, strict=True)):
                if before != after and before * (layers.count + 1) == after * layers.count:
                    role.by_layer.add(dim)


def _computes(builder: Builder, values: Values) -> bool:
    """A model of these sizes runs: what a constructor accepts, a forward pass may not."""
    try:
        check_forward(builder.build(values))
    except Exception:  # a refusal of the class
        return False
    return True


def _with_partners(
    path: Path,
    other: Mapping[Path, int],
    together: Mapping[Path, tuple[Path, ...]],
    numbers: Mapping[Path, int],
) -> dict[Path, int]:
    scale = other[path] // numbers[path] if other[path] % numbers[path] == 0 else 2
    return {path: other[path]} | {
        p: scale * numbers.get(p, numbers[path]) for p in together.get(path, ())
    }


def _counts_experts(plain: Mapping[str, Shape], found: Mapping[str, Shape]) -> bool:
    """The names differ in numbers of experts alone."""

    def bare(names: Mapping[str, Shape]) -> set[str]:
        return {re.sub(r"(expert[^.]*)\.\d+\.", r"\1.#.", name) for name in names}

    return bare(plain) == bare(found)


def _signatures(
    base: Mapping[str, Shape],
    variations: _Variations,
    changes: Mapping[Path, Mapping[Path, int]],
    names: Names,
) -> dict[str, tuple[Any, ...]]:
    """Name -> its shapes under every single change."""
    found = {name: [shape] for name, shape in base.items()}
    for change in changes.values():
        shapes = variations.shapes(change) or {}
        for name, seen in found.items():
            seen.append(shapes.get(name, ()))
    return {name: tuple(seen) for name, seen in found.items()}


def _roles(
    base: Mapping[str, Shape], signatures: Mapping[str, tuple[Any, ...]], names: Names
) -> list[Role]:
    """Tensors of one name and one behaviour, in the order of the file."""
    grouped: dict[tuple[str, Any], list[int]] = {}
    for name in base:
        layer, template, _ = names.role_name(name)
        members = grouped.setdefault((template, signatures[name]), [])
        if layer is not None and layer not in members:
            members.append(layer)
    return [
        Role(template, signature[0], tuple(sorted(members)))
        for (template, signature), members in grouped.items()
    ]


def _polynomial(
    role: Role,
    dim: int,
    variations: _Variations,
    changes: Mapping[Path, Mapping[Path, int]],
    other: Mapping[Path, int],
    numbers: Mapping[Path, int],
    fixed: Sequence[Path],
) -> Polynomial | None:
    """The dimension as a sum of products of fields; None where it is none."""
    name, width = role.instance(), role.shape[dim]

    def at(paths: Sequence[Path]) -> int | None:
        change = variations.joined(changes[path] for path in paths)
        shape = (variations.shapes(change) or {}).get(name)
        return None if shape is None or len(shape) != len(role.shape) else shape[dim]

    depends = [path for path in changes if at([path]) not in (None, width)]
    role.depends.append(depends)
    if len(depends) > MOST_FIELDS:
        return None
    corners: dict[tuple[Path, ...], int] = {}
    for size in range(len(depends) + 1):
        for chosen in combinations(depends, size):
            value = at(chosen)
            if value is None:
                return None
            corners[chosen] = value
    found = multilinear(corners, depends, numbers, other)
    if found is not None:
        return found
    points = [
        (
            {p: numbers[p] for p in numbers}
            | {p: v for path in chosen for p, v in changes[path].items()}
            | {path: other[path] for path in chosen},
            value,
        )
        for chosen, value in corners.items()
    ]
    return quotient(points, depends, fixed)


def quotient(
    points: Sequence[tuple[Mapping[Path, int], int]],
    depends: Sequence[Path],
    fixed: Sequence[Path] = (),
) -> Polynomial | None:
    """A size that is computed by a division (``kv_heads * hidden / heads``), if one fits.

    Args:
        points: (numbers, size) that it has to give.
        depends: the fields.
        fixed: numbers that it may be divided by too.
    """
    for divisor in [*depends, *fixed]:
        others = [path for path in depends if path != divisor]
        for extra in [(), *((path,) for path in others)]:
            key = (*others, (PER, *divisor))
            ones = [evaluate({key: 1}, at) for at, _ in points]
            rest = [evaluate({extra: 1}, at) if extra else 0 for at, _ in points]
            for second in range(4) if extra else (0,):
                left = [size - second * part for (_, size), part in zip(points, rest, strict=True)]
                factor = left[0] // ones[0] if ones[0] else 0
                if factor > 0 and all(a == factor * b for a, b in zip(left, ones, strict=True)):
                    return {key: factor} | ({extra: second} if second else {})
    return None


def multilinear(
    corners: Mapping[tuple[Path, ...], int],
    depends: Sequence[Path],
    numbers: Mapping[Path, int],
    other: Mapping[Path, int],
) -> Polynomial | None:
    """Coefficients of the polynomial, linear in each field, with these values at the corners.

    Args:
        corners: fields that have their other value -> value of the polynomial.
        depends: the fields.
        numbers, other: their two values.

    Returns:
        Product of fields -> whole coefficient; None where one is not whole.
    """
    # In t = (x - number) / (other - number) the coefficients are alternating sums of corners.
    in_t: dict[tuple[Path, ...], Fraction] = {}
    for size in range(len(depends) + 1):
        for chosen in combinations(depends, size):
            total = Fraction(0)
            for inner_size in range(size + 1):
                for inner in combinations(chosen, inner_size):
                    total += (-1) ** (size - inner_size) * corners[inner]
            in_t[chosen] = total
    result: dict[tuple[Path, ...], Fraction] = {}
    for chosen, coefficient in in_t.items():
        if not coefficient:
            continue
        terms: dict[tuple[Path, ...], Fraction] = {(): coefficient}
        for path in chosen:
            step = other[path] - numbers[path]
            expanded: dict[tuple[Path, ...], Fraction] = {}
            for key, value in terms.items():
                grown = (*key, path)
                expanded[grown] = expanded.get(grown, Fraction(0)) + value / step
                expanded[key] = expanded.get(key, Fraction(0)) - value * numbers[path] / step
            terms = expanded
        for key, value in terms.items():
            result[key] = result.get(key, Fraction(0)) + value
    result = {key: value for key, value in result.items() if value}
    if any(value.denominator != 1 for value in result.values()):
        return None
    return {tuple(sorted(key)): int(value) for key, value in result.items()}


def evaluate(polynomial: Polynomial, numbers: Mapping[Path, int]) -> int:
    """Its value at these sizes."""
    total = 0
    for key, coefficient in polynomial.items():
        product, divisor = coefficient, 1
        for path in key:
            if path[0] == PER:
                divisor *= numbers[path[1:]]
            else:
                product *= numbers[path]
        total += product // divisor
    return total


__all__ = ["Axes", "Polynomial", "Role", "evaluate", "find_axes", "leaf", "multilinear"]
