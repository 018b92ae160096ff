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
from growkit.derive.stored import Arrays, relative_error
from growkit.derive.twin import Path, Underivable, Values, token_ids
from growkit.derive.widths import WidthProbe
from growkit.families.layer_fields import leaf, with_values

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
    matrices = {key for key in plain if len(axes.roles[key[0]].shape) > 1}
    vectors = {place for place, _ in plain if len(axes.roles[place].shape) == 1}
    off = np.arange(hidden) < hidden // 2
    _find_gains(axes, found, vectors, fresh)

    def without(back: set[Key]) -> Arrays:
        """The file without half of the channels, but in ``back``."""
        changed: Arrays = {}
        for place, dim in plain - back:
            for name in probe.members[place]:
                array = changed.get(name, probe.weights[name]).copy()
                np.moveaxis(array, dim, 0)[off] = -found.gains.get(place, 0.0)
                changed[name] = array
        return changed

    silent = set()
    for key in matrices:
        gradient = probe.of_role(probe.gradients(without({key}), 0), *key)
        if _none(gradient[off], gradient):
            silent.add(key)
    back = probe.gradients(without(silent), 0)
    for key in silent:
        gradient = probe.of_role(back, *key)
        (found.readers if _none(gradient[off], gradient) else found.inner).add(key)
    for key, parts in found.inside.items():
        if parts > 1:
            gradient = probe.of_role(back, *key).reshape(parts, hidden)
            (found.readers if _none(gradient[:, off], gradient) else found.inner).add(key)
    outside = [place for place in found.gains if not axes.roles[place].per_layer]
    outside.sort(key=lambda place: -probe.position.get(axes.roles[place].instance(), -1))
    found.final = next((place for place in outside if _ends(probe, place, found)), None)
    return found


def _inside(axes: Axes, path: Path, taken: set[Key]) -> Iterator[tuple[Key, int]]:
    """Dimensions that are made of whole times the hidden size."""
    for place, role in enumerate(axes.roles):
        for dim, size in enumerate(role.sizes):
            if not size or (place, dim) in taken or dim in role.by_layer:
                continue
            parts, left = divmod(role.shape[dim], axes.fields[path])
            if len(size) == 1 and path in next(iter(size)) and not left:
                yield (place, dim), parts


def _none(part: npt.NDArray[np.float64], whole: npt.NDArray[np.float64]) -> bool:
    return bool(part.max(initial=0.0) <= SILENT * whole.max(initial=0.0))


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


def find_padding(probe: WidthProbe, found: Stream, values: Values, place: Path) -> None:
    """What padding has to know: whether norms subtract the mean, and their epsilon."""
    probe.model.write(probe.weights)
    logits = probe.model.logits()
    embedding = probe.model.model.get_input_embeddings().weight
    shifted = dict(probe.weights)
    for key in found.inside:
        name = probe.axes.roles[key[0]].instance()
        if name in probe.model.opaque or probe.axes.roles[key[0]].per_layer:
            continue
        if probe.model.state[probe.model.parameter_of(name)] is embedding:
            shifted[name] = shifted[name] + np.float32(0.5)
    probe.model.write(shifted)
    found.centred = relative_error(probe.model.logits(), logits) < 1e-4
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
        result = other(input_ids=token_ids(other), use_cache=False).logits.detach().float()
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
