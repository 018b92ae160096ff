"""The residual stream: which tensors read it, which write it, and how it is normalised.

Half of the channels are taken away from every tensor with a dimension of the hidden size, so they
are zero everywhere. Then one tensor gets its own back: what writes the stream now has a gradient
there (the channels are no longer zero, and norms run over them), what reads it reads zeros, so that
its gradient is exactly zero. With all of the readers back, a dimension that still gets a gradient
stands for units inside a block (channels of a convolution, heads that fill the hidden size).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.derive.axes import Axes
from growkit.derive.builder import Path, Underivable, Values, token_ids
from growkit.derive.stored import Arrays, relative_error
from growkit.derive.widths import WidthProbe
from growkit.families.layer_fields import leaf, with_values
from growkit.verification.model_inputs import outputs

Key = tuple[int, int]
SILENT = 1e-7  # of the largest gradient of the same tensor


@dataclass
class Stream:
    """What was found.

    Attributes:
        path: config field of the hidden size.
        inside: (role, dimension) -> parts as wide as the hidden size that it has.
        readers: (role, dimension) that read the stream, or units of its size inside a block.
        inner: (role, dimension) of such units, readers among them.
        gains: role -> what the class adds to a norm's stored gain: 0 or 1.
        biases: roles of the biases of norms over the stream.
        final: role of the gain of the last norm; None where it has none.
        centred: the norms subtract the mean.
        eps: config field of their epsilon and its value; None where the class has a constant.
        no_padding: why new channels cannot be silent, or empty.
    """

    path: Path
    inside: dict[Key, int]
    readers: set[Key] = field(default_factory=set)
    inner: set[Key] = field(default_factory=set)
    gains: dict[int, float] = field(default_factory=dict)
    biases: set[int] = field(default_factory=set)
    final: int | None = None
    centred: bool = False
    eps: tuple[str, float] | None = None
    no_padding: str = ""


def find_stream(probe: WidthProbe, path: Path, taken: set[Key], fresh: Arrays) -> Stream:
    """Readers and norms of the residual stream.

    Args:
        probe: of the twin.
        path: config field of the hidden size.
        taken: dimensions that other axes are known to fill.
        fresh: the file as the class begins it.
    """
    axes, hidden = probe.axes, probe.axes.fields[path]
    found = Stream(path, dict(_inside(axes, path, taken)))
    plain = {key for key, parts in found.inside.items() if parts == 1}
    vectors = {key for key in plain if len(axes.roles[key[0]].shape) == 1}
    _find_gains(axes, found, {place for place, _ in vectors}, fresh)
    _find_final(probe, found)
    found.centred = _centred(probe)
    # Heads that share key/value heads have fewer rows than the stream has channels.
    near = {key for key in probe.dims(path) if key not in taken and _equal_parts(axes, key)}
    several = near - plain

    def gradient(back: set[Key], key: Key) -> tuple[bool, npt.NDArray[np.float64]]:
        """Whether nothing reaches the missing half of a dimension, the others of ``back`` whole."""
        along = probe.of_role(known(back), *key)
        off = _half(len(along), hidden, union=False)
        return bool(along[off].max(initial=0.0) <= SILENT * along.max(initial=0.0)), along

    cache: dict[frozenset[Key], Arrays] = {}
    # Without gains, what a norm subtracts shows in channels of zeros: the others cancel instead.
    mirrored = found.centred and not found.gains

    def known(back: set[Key]) -> Arrays:
        """Gradients of the twin without half of the channels, but in ``back``."""
        if frozenset(back) not in cache:
            changed: Arrays = {}
            for place, dim in near - back:
                for name in probe.members[place]:
                    array = changed.get(name, probe.weights[name]).copy()
                    off = _half(array.shape[dim], hidden, union=True)
                    rows = np.moveaxis(array, dim, 0)
                    rows[off] = -found.gains.get(place, 0.0)
                    if mirrored:
                        _mirror(rows, hidden)
                    changed[name] = array
            cache.clear()
            cache[frozenset(back)] = probe.gradients(changed, 0)
        return cache[frozenset(back)]

    def is_silent(key: Key) -> bool:
        quiet, along = gradient({key}, key)
        if not along.any():  # a block that multiplies its parts is dead without half of them
            quiet, _ = gradient({key} | several, key)
        return quiet

    silent = {key for key in plain if is_silent(key)}
    # A norm that subtracts the mean gives channels of zeros a value, by its gain and bias.
    back = (silent - vectors if found.centred else silent) | several
    for key in back:
        (found.readers if gradient(back, key)[0] else found.inner).add(key)
    # A matrix that reads the stream makes something of its own: norms over it hid that.
    places = {place for place, _ in found.readers}
    found.inner |= {key for key in plain - silent - vectors if key[0] in places}
    back |= found.inner
    for key in back - found.inner:
        if not gradient(back, key)[0]:
            found.inner.add(key)
    found.readers -= found.inner
    back = found.inner | (silent & vectors)
    found.inner |= {key for key in silent & vectors if not gradient(back, key)[0]}
    found.readers -= vectors
    found.inner &= found.inside.keys()
    found.readers &= found.inside.keys()
    for place, _ in found.inner & vectors:
        found.gains.pop(place, None)
        found.biases.discard(place)
    return found


def _half(width: int, hidden: int, *, union: bool) -> npt.NDArray[np.bool_]:
    """The first half of the channels; of several parts, of each (``union``: and of the whole)."""
    part = width // max(1, width // hidden)
    places = np.arange(width)
    off = places % part < part // 2
    return off | (places < width // 2) if union else off


def _mirror(rows: npt.NDArray[Any], hidden: int) -> None:
    """The last quarter of the channels of every part becomes the third one, negated."""
    if len(rows) % hidden == 0:
        for part in np.split(rows, len(rows) // hidden):
            part[hidden - hidden // 4 :] = -part[hidden // 2 : hidden // 2 + hidden // 4]


def _equal_parts(axes: Axes, key: Key) -> bool:
    """All of a dimension is a product with the hidden size."""
    return len(axes.roles[key[0]].sizes[key[1]] or {}) == 1


def _inside(axes: Axes, path: Path, taken: set[Key]) -> Iterator[tuple[Key, int]]:
    """Dimensions that are made of whole times the hidden size."""
    for place, role in enumerate(axes.roles):
        for dim, size in enumerate(role.sizes):
            if not size or (place, dim) in taken or dim in role.by_layer:
                continue
            parts, left = divmod(role.shape[dim], axes.fields[path])
            if len(size) == 1 and path in next(iter(size)) and not left and parts:
                yield (place, dim), parts


# -- norms ----------------------------------------------------------------------------------------


def _find_gains(axes: Axes, found: Stream, vectors: set[int], fresh: Arrays) -> None:
    """Gains begin as ones, or as zeros where the class multiplies by 1 + w."""
    names = {place: axes.roles[place].name for place in vectors}
    for place, name in names.items():
        array = fresh[axes.roles[place].instance()]
        first = float(array[0])
        if not name.endswith("bias") and first in (0.0, 1.0) and (array == first).all():
            found.gains[place] = 1.0 - first
    stems = {names[place].rpartition(".")[0] for place in found.gains}
    found.biases = {
        place
        for place, name in names.items()
        if name.endswith("bias") and name.rpartition(".")[0] in stems
    }


def _find_final(probe: WidthProbe, found: Stream) -> None:
    """The norm that ends the stream; it tells whether gains are w or 1 + w in any case."""
    roles, guessed = probe.axes.roles, dict(found.gains)
    outside = [place for place in guessed if not roles[place].per_layer]
    outside.sort(key=lambda place: -probe.position.get(roles[place].instance(), -1))
    for others in (False, True):
        found.gains = {p: 1.0 - offset if others else offset for p, offset in guessed.items()}
        found.final = next((place for place in outside if _ends(probe, place, found)), None)
        if found.final is not None:
            return
    found.gains = guessed


def _ends(probe: WidthProbe, place: int, found: Stream) -> bool:
    """Without this gain (and its bias) all logits are the same, whatever the token."""
    roles = probe.axes.roles
    stem = roles[place].name.rpartition(".")[0]
    changed: Arrays = {}
    for other, offset in [(place, found.gains[place]), *((b, 0.0) for b in found.biases)]:
        if roles[other].name.rpartition(".")[0] == stem:
            for name in probe.members[other]:
                changed[name] = np.full_like(probe.weights[name], -offset)
    probe.model.write({**probe.weights, **changed})
    logits = probe.model.logits()
    return bool((logits - logits[:1, :1]).abs().max() <= 1e-6 * logits.abs().max().clamp_min(1.0))


def _centred(probe: WidthProbe) -> bool:
    """Norms subtract the mean: a number added to the whole embedding is never seen."""
    probe.model.write(probe.weights)
    logits = probe.model.logits()
    embedding = probe.model.model.get_input_embeddings().weight
    shifted = dict(probe.weights)
    for role in probe.axes.roles:
        name = role.instance()
        if name in probe.model.opaque or role.per_layer:
            continue
        if probe.model.state[probe.model.parameter_of(name)] is embedding:
            shifted[name] = shifted[name] + np.float32(0.5)
    probe.model.write(shifted)
    found = probe.model.logits()
    # An output projection that is tied to the embedding adds one number to all logits of a token.
    level = [part - part.mean(dim=-1, keepdim=True) for part in (found, logits)]
    return relative_error(*level) < 1e-4


def find_padding(probe: WidthProbe, found: Stream, values: Values, place: Path) -> None:
    """What padding has to know of norms: their epsilon."""
    probe.model.write(probe.weights)
    logits = probe.model.logits()
    fields = [
        name
        for name, value in leaf(values, place).items()
        if isinstance(value, float) and "eps" in name and value < 0.1
    ]
    used: list[tuple[str, float]] = []
    for name in fields:
        changed = with_values(values, {(*place, name): 1.0})
        try:
            other: Any = probe.model.builder.build(changed)
        except Exception:  # a refusal of the class
            continue
        other.load_state_dict(_like(probe, other))
        result = outputs(other, token_ids(other)).detach().float()
        if relative_error(result, logits) > 1e-4:
            used.append((name, float(leaf(values, place)[name])))
    if len(used) > 1:
        found.no_padding = "it has several epsilons of norms: " + ", ".join(n for n, _ in used)
    found.eps = used[0] if len(used) == 1 else None


def _like(probe: WidthProbe, other: Any) -> dict[str, Any]:
    """The twin's state, for another model of the same shapes."""
    probe.model.write(probe.weights)
    state: dict[str, Any] = probe.model.model.state_dict()
    if state.keys() != other.state_dict().keys():
        raise Underivable("The class holds other tensors for another epsilon.")
    return state
