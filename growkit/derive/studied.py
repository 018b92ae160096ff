"""What is found of a class: twin, axes, closings and widths, one after another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
from torch import nn

from growkit.derive.axes import HEADS, HIDDEN, KV_HEADS, PER, WIDTHS, Axes, find_axes, name_of
from growkit.derive.builder import (
    Builder,
    Path,
    Underivable,
    Values,
    as_held,
    check_forward,
    integers,
)
from growkit.derive.closings import Closings, LayerInsertion, find_closings
from growkit.derive.layer_stacks import Layers, find_layers, text_place, towers_beside
from growkit.derive.pictures import grows_along, hidden_of, with_sight
from growkit.derive.residual_stream import Stream, find_padding, find_stream
from growkit.derive.stored import Arrays, StoredModel, saved
from growkit.derive.twin import make_twin
from growkit.derive.widths import Width, WidthProbe
from growkit.families.derived.form import INNER, of_every_layer, width_name
from growkit.families.layer_fields import factor_name, leaf, made_of_factor, with_values
from growkit.verification.model_inputs import can_generate, reads_tokens

Step = Callable[[str], None]
TIES = "tie_word_embeddings"


@dataclass
class Findings:
    """What was found of one twin.

    Attributes:
        values, layers: its config.
        axes, closings: of its file; ``second``: closings of the decoder's stack.
        widths: axis name -> readers and labels.
        paths: axis name -> fields that count it.
        failures: axis name -> why it cannot grow.
        weights: its file, with which everything was found.
        fresh: its file as the class begins it.
        order: file names in the order of the forward pass.
        dead: roles that get no gradient.
        untied: the flag that was cleared to give the twin an output projection of its own.
        stream: of the residual stream; None where nothing could be said.
        fills: axis of heads that fill the hidden size, whatever their number (they have to grow
            together) -> fields that it is multiplied by for that.
        rounded: what the twin's config said before, where the class makes other widths of those
            that it states unless a flag is changed: that flag's value, and those widths.
    """

    values: Values
    layers: Layers
    model: StoredModel
    axes: Axes
    weights: Arrays
    fresh: Arrays
    order: list[str]
    dead: set[int]
    closings: Closings = field(default_factory=Closings)
    second: Closings | None = None
    widths: dict[str, Width] = field(default_factory=dict)
    paths: dict[str, list[Path]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    untied: Path | None = None
    stream: Stream | None = None
    fills: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    rounded: dict[Path, int] = field(default_factory=dict)

    @property
    def wrapped(self) -> bool:
        """The language model is a part of the whole, beside towers."""
        return bool(self.layers.place or towers_beside(self.values))

    def drop(self, names: Sequence[str], why: str) -> None:
        """These axes do not grow: what they are cannot be said."""
        for axis in names:
            known = self.widths.pop(axis, None)
            paths = self.paths.pop(axis, [])
            self.failures[f"ffn:{paths[0][-1]}" if axis.startswith("ffn") else axis] = why
            if axis == "hidden" or self.fills.pop(axis, None) is not None:
                self.stream = None
                self.failures["hidden"] = why
            if axis == "query_head":
                self.paths.pop("kv_head", None)
            assert known is not None or axis == "hidden"
        others = [axis for axis in self.widths if axis.startswith("ffn")]
        if others and "ffn" not in others:  # --ffn names the first
            self.widths["ffn"] = self.widths.pop(others[0])
            self.paths["ffn"] = self.paths.pop(others[0])

    def width_of(self, axis: str) -> Path:
        """Stands for the width of heads that fill the hidden size; no field of the config."""
        return (*self.layers.place, width_name(axis))


def explicit(builder: Builder, config: Any) -> Values:
    """Every field of a config; widths that it leaves to the class are given a number."""
    values, _ = as_held(config)
    layers = find_layers(builder, values)
    values = _with_widths(builder, _said_once(builder, values, layers), layers)
    inner = leaf(values, layers.place)
    unset = {name: 96 for name, value in inner.items() if value is None and WIDTHS.fullmatch(name)}
    hidden = next((v for n, v in inner.items() if HIDDEN.fullmatch(n) and isinstance(v, int)), 0)
    heads = next((v for n, v in inner.items() if HEADS.fullmatch(n) and isinstance(v, int)), 0)
    if inner.get("head_dim") is None and heads and hidden >= heads:
        unset["head_dim"] = 2 * (hidden // heads)  # many classes read it without declaring it
    for name, size in unset.items():
        path = (*layers.place, name)
        for few in dict.fromkeys(min(count, layers.count) for count in (2, 8)):  # of every kind
            short = layers.moved(values, range(few))
            try:
                told = builder.shapes(with_values(short, {path: size}))
            except Exception:  # the class wants it so
                continue
            if told != _shapes_or_none(builder, short):
                size = hidden // heads if name == "head_dim" else size
                values = with_values(values, {path: size})
                break
    return values


def _said_once(builder: Builder, values: Values, layers: Layers) -> Values:
    """Widths that the config says of every layer alike said once, where the class takes that."""
    counts = (min(2, layers.count), layers.count)
    shorts = [layers.moved(values, range(count)) for count in dict.fromkeys(counts)]
    for name, value in leaf(values, layers.place).items():
        size, path = of_every_layer(value), (*layers.place, name)
        if size is not value and WIDTHS.fullmatch(name) and len(value) == layers.count:
            short = next((s for s in shorts if _shapes_or_none(builder, s)), {})
            shapes = _shapes_or_none(builder, with_values(short, {path: size})) if short else None
            if shapes and shapes == _shapes_or_none(builder, short):
                values = with_values(values, {path: size})
    return values


def _with_widths(builder: Builder, values: Values, layers: Layers) -> Values:
    """Widths that the class makes of a factor and of its hidden size, as numbers of their own."""
    path, size = hidden_of(values, layers.place)
    short = layers.moved(values, range(min(2, layers.count)))
    inner = leaf(values, layers.place)
    factors = [n for n, v in inner.items() if isinstance(v, float) and WIDTHS.fullmatch(n) and size]
    for factor in factors:
        stem = factor.partition("_")[0]
        multiples = [n for n, v in inner.items() if "multiple" in n and stem in n and v]
        for multiple in (*multiples, ""):
            name = factor_name(factor, path[-1], multiple)
            width = made_of_factor(inner[factor], size, inner[multiple] if multiple else 1)
            plain, same, more = (
                _shapes_or_none(builder, with_values(short, changes))
                for changes in ({}, *({(*layers.place, name): width + n} for n in (0, 1)))
            )
            if plain is not None and same == plain and more not in (None, plain):
                values = with_values(values, {(*layers.place, name): width})
                break
    return values


def _shapes_or_none(builder: Builder, values: Values) -> Any:
    """Shapes of the module; None where the class refuses a config that leaves so much open."""
    try:
        return builder.shapes(values)
    except Exception:  # whatever it objects to
        return None


def untied(builder: Builder, values: Values) -> tuple[Values, Path | None]:
    """The twin with an output projection of its own, and the flag that decides about that, if any:
    of the text part, or of the whole."""
    for path in (p for p in ((*text_place(values), TIES), (TIES,)) if leaf(values, p) is not None):
        tried = [with_values(values, {path: tie}) for tie in (False, True)]
        try:
            names = [set(saved(builder.build(option))) for option in tried]
            check_forward(builder.build(tried[0]))
        except Exception:  # a refusal of the class
            continue
        if names[1] < names[0]:
            return tried[0], path
    return values, None


def exact_widths(
    builder: Builder, values: Values, layers: Layers
) -> tuple[Values, dict[Path, int]]:
    """The twin with an FFN as wide as its config says, and what its config said before if the class
    then rounds widths by a flag (LFM2's ``block_auto_adjust_ff_dim``): flag and width."""
    plain = _shapes_or_none(builder, values)
    inner = leaf(values, layers.place)
    for name, size in inner.items():
        path = (*layers.place, name)
        if not WIDTHS.fullmatch(name) or not isinstance(size, int) or isinstance(size, bool):
            continue
        steps = [
            _shapes_or_none(builder, with_values(values, {path: n})) for n in (size + 1, 32 * size)
        ]
        if steps[0] != plain or steps[1] in (None, plain):
            continue  # one more is one more already, or it says nothing
        for flag in (n for n, value in inner.items() if isinstance(value, bool)):
            other = with_values(values, {(*layers.place, flag): not inner[flag]})
            exact = _as_wide(builder, other, path, plain)
            if exact is not None:
                return exact, {(*layers.place, flag): inner[flag], path: size}
    return values, {}


def _as_wide(builder: Builder, values: Values, path: Path, wanted: Any) -> Values | None:
    """The config with the number there that makes these shapes, if it counts by one."""
    size = leaf(values, path)
    here, more = (
        _shapes_or_none(builder, with_values(values, {path: n})) for n in (size, size + 1)
    )
    if here is None or more is None or here.keys() != wanted.keys():
        return None
    for name, shape in here.items():
        for dim, (before, after) in enumerate(zip(shape, more[name], strict=True)):
            if after > before:
                found = size + (wanted[name][dim] - before) // (after - before)
                exact = with_values(values, {path: found})
                return exact if _shapes_or_none(builder, exact) == wanted else None
    return None


def rounded_twin(builder: Builder, found: Findings) -> Findings:
    """The same twin by a config whose widths the class rounds up to those that it has."""
    values = with_values(found.values, found.rounded)
    return replace(found, values=values, model=StoredModel(builder, values))


def tied_twin(builder: Builder, found: Findings) -> Findings:
    """The same twin, its embeddings tied."""
    assert found.untied is not None
    values = with_values(found.values, {found.untied: True})
    model = StoredModel(builder, values)
    weights = {name: found.weights[name] for name in model.shapes if name in found.weights}
    return replace(found, values=values, model=model, weights=weights)


def _honest_head_dim(builder: Builder, values: Values, layers: Layers) -> Values:
    """Without a head_dim that only a part of the class reads (norms of OLMoE do not)."""
    path = (*layers.place, "head_dim")
    size = leaf(values, path)
    if not isinstance(size, int):
        return values
    bare = with_values(values, {})
    leaf(bare, layers.place).pop("head_dim")
    if _constant(builder, bare, path):
        return values
    try:
        check_forward(builder.build(with_values(values, {path: 2 * size})))
    except Exception:  # a refusal of the class
        try:
            return bare if builder.shapes(bare) == builder.shapes(values) else values
        except Exception:  # it has to be stated
            return values
    return values


def _constant(builder: Builder, bare: Values, path: Path) -> bool:
    """The class puts the same number for a silent field, whatever its hidden size is."""
    hidden = [p for p, _ in integers(bare) if HIDDEN.fullmatch(p[-1]) and p[:-1] == path[:-1]]
    changed = with_values(bare, {p: 2 * leaf(bare, p) for p in hidden[:1]})
    try:
        found = leaf(builder.config(bare).to_dict(), path)
        return isinstance(found, int) and found == leaf(builder.config(changed).to_dict(), path)
    except Exception:  # a number that does not go with it: it does not follow from it
        return True


def study(
    builder: Builder,
    values: Values,
    step: Step,
    *,
    keep_ties: bool = False,
    keep: Collection[Path] = (),
) -> Findings:
    """Twin, axes, closings and widths.

    Args:
        keep_ties: leave the output projection of the twin tied as the config says. Encoders are
            left so in any case: what their heads tie is more than one matrix.
        keep: fields that decide what layers are, which the twin has to have as they are.

    Raises:
        Underivable: nothing can be said of the class.
    """
    step("twin")
    small, layers = make_twin(builder, values, keep, with_sight)
    small = _honest_head_dim(builder, small, layers)
    keep_ties = keep_ties or not can_generate(builder.build(small))
    small, may_tie = (small, None) if keep_ties else untied(builder, small)
    small, rounded = exact_widths(builder, small, layers)
    step("axes")
    hidden, _ = hidden_of(small, layers.place)
    again = grows_along(builder, small, layers)
    axes = find_axes(builder, small, layers, {hidden: again} if again else {})
    model = StoredModel(builder, small)
    if model.unread:
        raise Underivable(f"The class does not save {model.unread[0]!r}.")
    fresh = model.read()
    weights = model.randomise()
    logits = model.logits()
    used: list[str] = []
    gradients = model.gradients(order=used)
    place = {name: number for number, name in enumerate(used)}
    reached = [name for name in weights if model.parameter_of(name) in place]
    order = sorted(reached, key=lambda name: place[model.parameter_of(name)])
    alive = {
        axes.names.role_name(name)[1] for name, value in gradients.items() if np.abs(value).any()
    }
    dead = {number for number, role in enumerate(axes.roles) if role.name not in alive}
    found = Findings(small, layers, model, axes, weights, fresh, order, dead, untied=may_tie)
    found.rounded = rounded
    step("depth")
    insertion = LayerInsertion(builder, small, layers, axes, weights, logits, fresh)
    if unseen := _unseen(found):
        found.closings.refusal = unseen
    else:
        found.closings = find_closings(insertion, order, dead)
    if layers.second:
        step("depth of the decoder")
        behind = replace(axes, names=axes.names.of_second())
        insertion = LayerInsertion(builder, small, layers.second, behind, weights, logits, fresh)
        found.second = find_closings(insertion, order, dead)
        found.closings.values |= found.second.values
        found.closings.passed |= found.second.passed
    step("widths")
    _find_widths(found)
    return found


def _unseen(found: Findings, paths: Sequence[Path] = ()) -> str:
    """Why text alone proves nothing of a wrapper's layers, or empty: weights that images or sound
    alone reach stand in them, or are as wide as what these fields count."""
    for number, role in enumerate(found.axes.roles):
        if not found.wrapped or number not in found.dead or len(role.shape) < 2:
            continue
        fields = {path for size in role.sizes for key in size or () for path in key}
        if fields & set(paths) if paths else role.per_layer:
            seen = "Text alone does not reach"
            if found.model.builder.sight is not None:
                seen = "Neither text nor what its towers were given reaches"
            return f"{seen} {role.name}, which has to grow along."
    return ""


def _check_seen(found: Findings, *paths: Path) -> None:
    """Raise where :func:`_unseen` has something to say of widths."""
    if unseen := _unseen(found, paths):
        raise Underivable(unseen)


def _find_widths(found: Findings) -> None:
    """Every axis that a name or an effect tells, and who writes and reads it."""
    stacks = [found.layers, found.layers.second] if found.layers.second else [found.layers]
    fields = [p for p in found.axes.fields if any(p[: len(s.place)] == s.place for s in stacks)]
    widths = [p for p in fields if WIDTHS.fullmatch(name_of(p))]
    heads = [p for p in fields if HEADS.fullmatch(p[-1]) and p not in found.axes.fixed]
    heads = [p for p in heads if p not in found.axes.bound]  # they fill the hidden size
    groups = [p for p in fields if KV_HEADS.fullmatch(p[-1])]
    probe = WidthProbe(found.model, found.axes, found.weights, found.order)
    names = ["ffn", *(f"ffn_{number}" for number in range(2, 9))]
    widths.sort(key=lambda p: (name_of(p) not in ("intermediate_size", "moe_intermediate_size"), p))
    unnamed = iter(names)
    for path in widths:
        try:
            _check_seen(found, path)
            width = probe.find(path)
        except Underivable as error:
            found.failures[f"ffn:{name_of(path)}"] = error.cause
            continue
        name = next(unnamed)
        found.widths[name], found.paths[name] = width, [path]
    if len({s.place for s in stacks}) > 1 and heads:
        found.failures["query_head"] = "Encoder and decoder count their heads in two fields."
        heads = []
    for path in heads[:1]:
        shared = [g for g in groups if path not in found.axes.together or g != path]
        joint = found.axes.together.get(path, ())
        try:
            _check_seen(found, path, *shared)
            width = probe.find(path, [g for g in shared if g not in joint])
        except Underivable as error:
            found.failures["query_head"] = error.cause
            continue
        found.widths["query_head"] = width
        found.paths["query_head"] = [path, *joint]
        for group in shared:
            if group not in joint:
                found.paths["kv_head"] = [group]
    if found.layers.second or not reads_tokens(found.model.model):
        found.failures["hidden"] = "Its hidden size is derived for models with one stack of tokens."
        return
    if found.wrapped and found.model.builder.sight is None:
        return  # its towers write the hidden size too, and nothing runs through them
    try:
        counted = [p for p, _ in integers(found.values) if p[:-1] == found.layers.place]
        heads = [p for p in counted if HEADS.fullmatch(p[-1])]
        _find_stream(found, probe, heads, groups)
    except Underivable as error:
        found.failures["hidden"] = error.cause
    except Exception as error:  # a class of its own kind
        first = (str(error).strip() or "-").splitlines()[0]
        found.failures["hidden"] = f"{type(error).__name__}: {first[:200]}"


def _find_stream(
    found: Findings, probe: WidthProbe, heads: Sequence[Path], groups: Sequence[Path]
) -> None:
    """The hidden size, and heads that fill it.

    Raises:
        Underivable: why it cannot grow.
    """
    path = hidden_path(found.model, found.axes)
    if path is None:
        raise Underivable("No field of the config sizes its embedding alone.")
    _check_seen(found, path)
    for role in found.axes.roles if found.wrapped else ():
        unsaid = [
            d for d, size in enumerate(role.sizes) if size is None and path in role.depends[d]
        ]
        if unsaid:
            raise Underivable(f"The size of {role.name} does not follow from the config.")
    _inner_heads(found, probe, path, heads[0] if heads else None)
    shared = [g for g in groups if probe.dims(g)][:1]
    wanted = bool(heads) and "query_head" not in found.widths
    if wanted and (fused := _fused(found, path, heads[0])):
        for reader in _fed_by(found, probe, fused):
            wanted = wanted and not _fill(found, probe, heads[0], shared, {reader, *fused}, path)
    taken = {key for width in found.widths.values() for key in {*width.labels, *width.readers}}
    stream = find_stream(probe, path, taken, found.fresh)
    found.stream = stream
    try:
        find_padding(probe, stream, found.values, found.layers.place)
    except Underivable as error:
        stream.no_padding = error.cause
    if not stream.inner:
        return
    if wanted:
        _fill(found, probe, heads[0], shared, _of_attention(found, stream.inner), path)
        width = found.widths.get("query_head", Width())
        stream.inner -= {*width.labels, *width.readers}
    if stream.inner:
        last = probe.last_readers(stream.inner)
        # A matrix that reads the stream gives what it makes on its other side: no reader there,
        # where an output projection that is tied to the embedding reads it (heads of BERT).
        stream.readers |= {key for key in last if not _gives(stream, key)}
        stream.readers |= _fed_in(found, stream.inner)


def _fed_in(found: Findings, inner: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """Of units of the hidden size in a wrapper's projectors, those on the input side of a module:
    one after another, which no probe of the whole tells apart."""
    result = set()
    for place, dim in inner if found.wrapped else ():
        role, model = found.axes.roles[place], found.model
        if role.per_layer or dim != 1 or role.instance() in model.opaque:
            continue
        stem = model.parameter_of(role.instance()).rpartition(".")[0]
        if isinstance(model.model.get_submodule(stem), nn.Linear | nn.Conv1d | nn.Conv2d):
            result.add((place, dim))
    return result


def _gives(stream: Stream, key: tuple[int, int]) -> bool:
    """Another dimension of the same matrix reads the residual stream."""
    return any(place == key[0] and dim != key[1] for place, dim in stream.readers)


def _fill(
    found: Findings,
    probe: WidthProbe,
    heads: Path,
    shared: list[Path],
    inside: set[tuple[int, int]],
    hidden: Path,
    axis: str = "query_head",
    times: tuple[Path, ...] = (),
) -> bool:
    """Heads that fill the hidden size, if they are told apart in these dimensions."""
    fields = found.axes.fields
    known = dict(fields)
    fields[heads] = leaf(found.values, heads)
    try:
        width = probe.find(heads, shared, inside=inside, mixes=not times)
        if any(width.readers & {key} for key in _fused(found, hidden, heads)):
            raise Underivable("It reads what it writes.")
    except Underivable:
        fields.clear()
        fields.update(known)
        return False
    found.widths[axis], found.paths[axis] = width, [heads]
    if shared:
        found.paths["kv_head"] = shared
    found.fills[axis] = times
    whole = prod(leaf(found.values, path) for path in (hidden, *times))
    fields[found.width_of(axis)] = whole // fields[heads]
    found.failures.pop(axis, None)
    return True


def _inner_heads(found: Findings, probe: WidthProbe, hidden: Path, heads: Path | None) -> None:
    """Heads of another kind than attention's (Mamba's), which the class wants to fill a multiple
    of the hidden size: an axis that grows along with it."""
    *bound, slack = found.axes.bound or ((),)
    for path in [p for p in bound if "heads" in p[-1]] if hidden in bound else []:
        times = tuple(p for p in bound if p not in (hidden, path))
        values = [leaf(found.values, p) for p in (hidden, *times)]
        if not times or prod(values) != leaf(found.values, path) * leaf(found.values, slack):
            continue
        inside = probe.dims(path) | {
            (place, dim)
            for place, role in enumerate(found.axes.roles)
            for dim, size in enumerate(role.sizes)
            if size and any({hidden, *times} <= set(key) for key in size)
        }
        _fill(
            found, probe, path, [], inside, hidden, "query_head" if path == heads else INNER, times
        )


def _fused(found: Findings, hidden: Path, heads: Path) -> set[tuple[int, int]]:
    """Dimensions of which heads that fill the hidden size are a part (beside shared keys)."""
    return {
        (place, dim)
        for place, role in enumerate(found.axes.roles)
        for dim, size in enumerate(role.sizes)
        if size and len(size) > 1 and any(hidden in key and (PER, *heads) in key for key in size)
    }


def _fed_by(
    found: Findings, probe: WidthProbe, fused: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Dimensions of the first matrix that reads what these tensors make: without them it has no
    gradient at all."""
    zeros = {n: np.zeros_like(probe.weights[n]) for place, _ in fused for n in probe.members[place]}
    base, silent = probe.gradients({}, 0), probe.gradients(zeros, 0)
    writers = {place for place, _ in fused}
    return [
        (place, dim)
        for place, role in enumerate(found.axes.roles)
        for dim in (1, 0)
        if role.per_layer and len(role.shape) == 2 and place not in writers
        if probe.of_role(base, place, dim).any() and not probe.of_role(silent, place, dim).any()
    ]


def _of_attention(found: Findings, inner: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """Those that attention has, where other blocks (Mamba) have units of their own too."""
    named = {key for key in inner if "att" in found.axes.roles[key[0]].name.rpartition("}")[2]}
    return named or inner


def hidden_path(model: StoredModel, axes: Axes) -> Path | None:
    """The field that says how wide the input embedding is."""
    embedding = model.model.get_input_embeddings().weight
    for role in axes.roles:
        name = role.instance()
        if role.per_layer or name in model.opaque or len(role.sizes) < 2:
            continue
        if model.state[model.parameter_of(name)] is embedding:
            return next((key[0] for key in role.sizes[1] or {} if len(key) == 1), None)
    return None
