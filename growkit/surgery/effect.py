"""What a change of a model is given and what it returns: growths and conversions alike, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from math import prod, sqrt
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import Checkpoint
from growkit.core.errors import UsageError
from growkit.families import Family, Tensor
from growkit.families.base import Dim
from growkit.families.unit_layout import Sizes
from growkit.surgery.axis_map import NEW, AxisMap
from growkit.surgery.operators import OPERATORS, OperatorRow

Array = npt.NDArray[Any]


class Fill(IntEnum):
    """What an entry of a new unit starts as. Where two new units meet, the smallest wins."""

    ZERO = 0
    MEAN = 1  # of the old entries, along the dimension that grows
    INIT = 2  # as a model from scratch: random in a projection, one in a gain
    TOKEN = 3  # rows of new tokens, made of the rows of old ones


@dataclass(frozen=True)
class NewUnits:
    """The rule of one axis.

    Attributes:
        produced: entries of what writes a new unit (rows of a projection, its bias).
        consumed: entries of what reads it.
        normed: gain and bias of a norm over the axis.
        keys: channels of attention keys (for head_dim), where they differ from ``produced``.
    """

    produced: Fill = Fill.INIT
    consumed: Fill = Fill.ZERO
    normed: Fill = Fill.INIT
    keys: Fill = Fill.INIT

    def of(self, dim: Dim) -> Fill:
        """The rule for one dimension of a tensor."""
        if dim.normed:
            return self.normed
        return self.consumed if dim.consumes else self.produced


# New heads and FFN units: anything may be computed where nobody listens yet.
SILENT = NewUnits()


class Exactness(str, Enum):
    """How far the grown model computes the same function, from best to worst."""

    BIT_EXACT = "bit-exact"  # the same numbers are added in the same way, or zeros are added
    EXACT = "exact"  # equal in real arithmetic; floating point adds in another order
    ROUNDED = "rounded"  # exact algebra, but new weights are rounded to the stored dtype
    NOT_EXACT = "not-exact"  # another function

    def worst(self, other: Exactness) -> Exactness:
        order = list(Exactness)
        return max(self, other, key=order.index)


@dataclass(frozen=True)
class LayerSource:
    """Where a layer of the grown model comes from.

    Attributes:
        source: index of the old layer; ``NO_LAYER`` where the source has none. A ``new`` layer
            takes nothing from it but its kind (window, experts) and its dtypes.
        kind: ``kept`` (the old layer), ``copy`` (a further copy), ``identity`` (a copy whose
            residual-writing projections are zero), ``new`` (made from scratch), ``aligned`` (its
            mean with ``partner``, see :mod:`growkit.surgery.aligned_layers`).
        partner: the other old layer that an aligned one is made of.
    """

    source: int
    kind: str
    partner: int = -1

    @property
    def from_scratch(self) -> bool:
        """No weight of it comes from the source."""
        return self.kind == "new" or self.source == NO_LAYER


NO_LAYER = -1

LayerMap = tuple[LayerSource, ...]


@dataclass(frozen=True)
class NewTokens:
    """How the rows of new tokens start (:mod:`growkit.surgery.token_rows`).

    Attributes:
        method: one of :data:`growkit.vocabulary.embedding_rows.METHODS`.
        parts: new row -> the old rows whose mean it is.
        old_tokens: rows of the old table that belong to tokens.
        bias: new row -> what is added to its entry of the head's bias.
    """

    method: str
    parts: Mapping[int, tuple[int, ...]]
    old_tokens: int
    bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelShape:
    """A model during planning: sizes after the operators so far; ``folder`` is the source's."""

    family: Family
    sizes: Mapping[str, int]
    config: Mapping[str, Any]
    folder: Path | None = None

    def has(self, role: str) -> bool:
        """A checkpoint of these sizes has the tensor with this role."""
        tensor = self.family.tensor(role)
        return tensor is not None and tensor.when(self.sizes)


@dataclass(frozen=True)
class Alias:
    """Units of a written axis are units of another axis of the source.

    Attributes:
        axis: the source's axis.
        parts: part of a unit in the written layout -> part of it in the source; None: the same. A
            part that is not named is new.
    """

    axis: str
    parts: Mapping[int, int] | None = None

    def part(self, written: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Source part of each written part, or ``NEW``."""
        if self.parts is None:
            return written
        return np.array([self.parts.get(int(p), NEW) for p in written], dtype=np.int64)


UnitMaps = tuple[Mapping[str, Alias], Mapping[str, AxisMap]]


@dataclass(frozen=True)
class Computed:
    """Entries of a written tensor that are calculated, not looked up.

    Attributes:
        rows: (checkpoint, source layer, first row, rows) -> block [rows, columns], wide enough
            (float32 or float64) to be rounded once to the stored dtype. Must not depend on how the
            rows are cut into blocks. A vector is a matrix of one column.
        reads: roles of the source that it is made of; the first one gives the dtype.
    """

    rows: Callable[[Checkpoint, int, int, int], Array]
    reads: tuple[str, ...]


@dataclass(frozen=True)
class WarmStart:
    """The two factors of a warm start (:mod:`growkit.surgery.warm_start`).

    Attributes:
        shrink: of the old weights, above 0.
        perturb: of the numbers of a start from scratch, 0 or more.
    """

    shrink: float
    perturb: float

    @property
    def told(self) -> str:
        return f"shrink-pad-perturb: old weights x {self.shrink:g}, the class's start x " + (
            f"{self.perturb:g} on top"
        )

    def noise(self, tensor: Tensor, before: Sizes, after: Sizes) -> float:
        """Factor on the class's spread of a matrix: ``perturb``, less where its fan-in grows."""
        ratios = (
            dim.layout(before).width / dim.layout(after).width
            for dim in tensor.dims
            if dim.consumes
        )
        return self.perturb * sqrt(prod(ratios))


@dataclass(frozen=True)
class FfnSplit:
    """How the units of a dense FFN are dealt out to experts, where not each gets all of them.

    Attributes:
        width: units of an expert.
        parts: experts that have all routed units together; they have equal router rows, so that
            they are chosen together.
        first: the first routed unit; those before it are the shared expert's alone.
        routed: part of the function that the routed experts compute, of the units they have.
        shared: part that the shared expert computes, of its own; 0: there is none.
    """

    width: int
    parts: int = 1
    first: int = 0
    routed: float = 1.0
    shared: float = 0.0

    @property
    def routed_factor(self) -> float:
        """On what an expert writes: it is multiplied by 1 / parts of the probability."""
        return self.routed * self.parts

    @property
    def shared_factor(self) -> float:
        """On what the shared expert writes: its gate begins at sigmoid(0), a half."""
        return 2.0 * self.shared

    def units(self, expert: int) -> npt.NDArray[np.int64]:
        """The FFN's units that an expert has."""
        return self.first + expert % self.parts * self.width + np.arange(self.width)


@dataclass(frozen=True)
class Effect:
    """What becomes of a model: by one operator, by several together, or by a conversion.

    Attributes:
        operator: name of the operator, for plan and manifest.
        summary: one sentence for the plan.
        exactness: how far the written model computes the same.
        reason: one line of algebra and its source.
        warnings: what a user should know before training.
        steps: what a composition was made of, in order.
        axes: map of every axis that changes, from the source to the written model.
        new_units: what new units of an axis hold, where it is not random and read with zero.
        perturbed: axes whose copies nobody shares a weight among, so that noise on what produces
            them has to part them.
        stacks: axis that counts layers -> source of every written layer, where depth changes; of a
            composition for every stack.
        kinds_by_rule: every layer is of the kind that the class gives to its index, also where the
            layer that it copies is of another.
        fresh_state: copied layers begin without optimizer state, as layers from scratch do.
        sizes: of an operator, further sizes and facts that change (``tied``); of a composition or
            conversion, all sizes of the written model.
        fields: config fields to rewrite, beside the sizes.
        config: the written config.json, where it is another (a conversion), complete but for
            ``auto_map``; else empty.
        family: name of the family of the grown model, when growth makes it another one (dense to
            experts).
        expert_copies: copies of every expert that the router always chooses together; what they
            write is their mean, so the weight may be shared among them.
        noisy_experts: experts made of one that get noise of their own, without being chosen
            together; the noise sums to zero over them.
        expert_reinit: part of each new expert's FFN units that is drawn anew.
        split: which units of the FFN each expert gets, where a dense model gets experts and not
            every one is the whole FFN.
        fused: role -> (role of the source, axis -> part of its units), where the source stores
            several matrices in one.
        noise_copies: each signal head subtracts this many copies of each old noise map, so lambda
            is divided by it.
        factors: role -> factor on its weight.
        norm_factor: factor on the gain of every norm over the residual stream.
        stream_factor: factor on everything that writes the residual stream.
        key_factor: factor on whatever makes attention keys.
        new_tokens: how the rows of new tokens start, when the vocabulary grows.
        files: further files of the grown folder (name -> content), in place of the source's.
        aliases: written axes that are another axis of the source.
        by_role: role -> (aliases, axes) that hold for it instead.
        starts: role -> how a tensor that the source has not starts (``zeros``, ``ones``,
            ``normal``), where the family's own start would change the function.
        computed: role -> how its entries are calculated.
        verbatim: roles whose bytes are the source's, whatever the two formats call their units.
        shared_rows: roles of which the model adds up the copies of a row: each gets a share.
        warm_start: old weights are shrunk and padded and new numbers are added to them.
        measure: further lines to say, from the source's weights; calculated when it is written.
    """

    operator: str = ""
    summary: str = ""
    exactness: Exactness = Exactness.EXACT
    reason: str = ""
    warnings: tuple[str, ...] = ()
    steps: tuple[Effect, ...] = ()
    axes: Mapping[str, AxisMap] = field(default_factory=dict)
    new_units: Mapping[str, NewUnits] = field(default_factory=dict)
    perturbed: frozenset[str] = frozenset()
    stacks: Mapping[str, LayerMap] = field(default_factory=dict)
    kinds_by_rule: bool = False
    fresh_state: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    family: str | None = None
    expert_copies: int = 1
    noisy_experts: int = 1
    expert_reinit: float = 0.0
    split: FfnSplit | None = None
    fused: Mapping[str, tuple[str, Mapping[str, int]]] = field(default_factory=dict)
    noise_copies: int = 1
    factors: Mapping[str, float] = field(default_factory=dict)
    norm_factor: float = 1.0
    stream_factor: float = 1.0
    key_factor: float = 1.0
    new_tokens: NewTokens | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    by_role: Mapping[str, UnitMaps] = field(default_factory=dict)
    starts: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Computed] = field(default_factory=dict)
    verbatim: frozenset[str] = frozenset()
    shared_rows: frozenset[str] = frozenset()
    warm_start: WarmStart | None = None
    measure: Callable[[Checkpoint], tuple[str, ...]] | None = None

    @property
    def converts(self) -> bool:
        """It writes the model in another attention, and does not grow it."""
        return bool(self.config)

    @property
    def layers(self) -> LayerMap:
        """Source of every layer of the first stack (the only one of a decoder)."""
        return self.stacks["layer"]

    @property
    def layers_moved(self) -> bool:
        """Some layer of the first stack stands at another index than its source."""
        return any("layer" in step.stacks for step in self.steps)

    @property
    def tied(self) -> tuple[str, ...]:
        """Axes whose copies get equal gradients whatever the shares: past 1:1 the copies of a noise
        head have equal rows, equal readers and one lambda, and their maps are added after the
        softmax, so that no split of their rows keeps the sum."""
        return ("noise_head",) if self.noise_copies > 1 and not self.perturbed else ()


class Operator(Protocol):
    """A request that becomes an effect: a small pure object, no tensor in sight.

    A conversion is one too.
    """

    def apply(self, shape: ModelShape) -> Effect:
        """Raises UsageError when the model cannot be changed that way."""
        ...


# -- what operators and conversions need to say it -------------------------------------------------


def growable(shape: ModelShape) -> list[str]:
    """The flags that this checkpoint can be grown by."""
    return [row.flag for row in OPERATORS.values() if _grows(row, shape)]


def _grows(row: OperatorRow, shape: ModelShape) -> bool:
    if row.flag in shape.family.refused:
        return False
    own = getattr(row.module, "grows", None)
    return bool(own(row, shape)) if own else row.axis in shape.sizes


def shares_heads(shape: ModelShape) -> bool:
    """The family can hold more query than key/value heads."""
    if "query_head" not in shape.sizes:
        return True
    sizes = {**shape.sizes, "query_head": 2 * shape.sizes["query_head"]}
    wider = {**sizes, "hidden": 2 * sizes["hidden"]}
    return any(shape.family.refusal(shape.config, tried) is None for tried in (sizes, wider))


def check_allowed(shape: ModelShape, option: str) -> None:
    """Raise UsageError when the family refuses the operator by name."""
    if reason := shape.family.refused.get(option):
        raise UsageError(
            f"{option} cannot grow a {shape.family.name} checkpoint: {reason}.",
            f"It can be grown by: {', '.join(growable(shape))}.",
        )


def require_axis(shape: ModelShape, axis: str, option: str) -> None:
    """Raise UsageError when the family has no such axis, or refuses the operator by name."""
    check_allowed(shape, option)
    if axis not in shape.sizes:
        raise UsageError(
            f"A {shape.family.name} checkpoint has no {axis.replace('_', ' ')}s, so {option} "
            "cannot grow it.",
            f"It can be grown by: {', '.join(growable(shape))}.",
        )


def constant_rows(make: Callable[[], Array], like: str = "q") -> Computed:
    """The same small tensor in every layer, in the dtype of the role ``like``."""

    def rows(checkpoint: Checkpoint, layer: int, first: int, count: int) -> Array:
        return np.asarray(make()[first : first + count], np.float64)

    return Computed(rows, (like,))


def filled(shape: tuple[int, ...], value: float) -> Computed:
    """One number everywhere."""
    return constant_rows(lambda: np.full(shape, value))
