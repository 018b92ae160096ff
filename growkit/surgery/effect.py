"""What an operator is given and what it returns, and what units without a source hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, Protocol

from growkit.families import Family
from growkit.families.base import Dim
from growkit.surgery.axis_map import AxisMap


class Fill(IntEnum):
    """What an entry of a new unit starts as. Where two new units meet, the smallest wins."""

    ZERO = 0
    MEAN = 1  # of the old entries, along the dimension that grows
    INIT = 2  # as a model from scratch: random in a projection, one in a gain


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
        source: index of the old layer.
        kind: ``kept`` (the old layer), ``copy`` (a further copy), ``identity`` (a copy whose
            residual-writing projections are zero).
    """

    source: int
    kind: str


LayerMap = tuple[LayerSource, ...]


@dataclass(frozen=True)
class ModelShape:
    """A model during planning: sizes after the operators so far."""

    family: Family
    sizes: Mapping[str, int]
    config: Mapping[str, Any]

    def has(self, role: str) -> bool:
        """A checkpoint of these sizes has the tensor with this role."""
        tensor = self.family.tensor(role)
        return tensor is not None and tensor.when(self.sizes)


@dataclass(frozen=True)
class Growth:
    """The effect of one operator.

    Attributes:
        operator: its name, for plan and manifest.
        summary: one sentence for the plan.
        axes: map of every axis that grows.
        layers: source of every layer of ``stack``, when depth changes.
        stack: the axis that counts these layers.
        kinds_by_rule: every layer is of the kind that the class gives to its index, also where the
            layer that it copies is of another.
        new_units: what new units of an axis hold, where it is not random and read with zero.
        sizes: further facts that change (``tied``).
        family: name of the family of the grown model, when it is another one (dense to experts).
        expert_copies: copies of every expert that the router always chooses together; what they
            write is their mean, so the weight may be shared among them.
        noisy_experts: experts made of one that get noise of their own, without being chosen
            together; the noise sums to zero over them.
        expert_reinit: part of each new expert's FFN units that is drawn anew.
        noise_copies: each signal head subtracts this many copies of each old noise map, so lambda
            is divided by it.
        final_norm_factor: factor on the final norm's gain (hidden growth with tied embeddings).
        embedding_factor: factor on the input embedding (its class scales by sqrt(hidden_size)).
        norm_factor: factor on the gain of every norm over the residual stream.
        stream_factor: factor on everything that writes the residual stream.
        key_factor: factor on whatever makes attention keys.
        config: config fields that it rewrites, beside the sizes.
        exactness: of the operator alone.
        reason: one line of algebra and its source.
        warnings: what a user should know before training.
    """

    operator: str
    summary: str
    axes: Mapping[str, AxisMap] = field(default_factory=dict)
    new_units: Mapping[str, NewUnits] = field(default_factory=dict)
    layers: LayerMap | None = None
    stack: str = "layer"
    kinds_by_rule: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    family: str | None = None
    expert_copies: int = 1
    noisy_experts: int = 1
    expert_reinit: float = 0.0
    noise_copies: int = 1
    final_norm_factor: float = 1.0
    embedding_factor: float = 1.0
    norm_factor: float = 1.0
    stream_factor: float = 1.0
    key_factor: float = 1.0
    config: Mapping[str, Any] = field(default_factory=dict)
    exactness: Exactness = Exactness.EXACT
    reason: str = ""
    warnings: tuple[str, ...] = ()


class Operator(Protocol):
    """A request that becomes axis maps: a small pure object, no tensor in sight."""

    def apply(self, shape: ModelShape) -> Growth:
        """Raises UsageError when the model cannot be grown that way."""
        ...
