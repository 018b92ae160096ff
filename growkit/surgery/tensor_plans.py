"""What each written tensor is made of, as data: the entries of the list at the heart of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from math import prod
from typing import Any

import numpy as np

from growkit.checkpoint import DTYPES, OutputTensor
from growkit.surgery.axis_map import NEW
from growkit.surgery.dim_map import DimMap
from growkit.surgery.effect import Computed, LayerSource
from growkit.surgery.lambdas import LambdaChange


class Action(str, Enum):
    """What is done for a written tensor.

    Each room has one table of them: how it is written (``WRITERS`` of
    :mod:`growkit.surgery.execute`), how it is compared with its source (``EXPLAINERS`` of
    :mod:`growkit.diff.explain`), and whether optimizer state continues (``WITHOUT_STATE`` of
    :mod:`growkit.optimizer_state.rules`); what of it is new, :attr:`all_new` says.
    """

    COPIED = "copied"  # the same bytes
    GROWN = "grown"  # some dimension has a map
    RESCALED = "rescaled"  # the same entries, times a factor
    PERTURBED = "perturbed"  # shrunk, padded with zeros, and a start from scratch added
    REDRAWN = "redrawn"  # a part of an expert's units is drawn anew
    LAMBDA = "lambda"  # a lambda vector whose layer moves, or whose noise maps are copied
    COMPUTED = "computed"  # entries are calculated, by a conversion
    NEW = "new"  # without a source
    ZERO = "zero"  # of an inserted layer
    CLOSED = "closed"  # likewise: a norm gain stored with an offset, so that the gain is zero

    @property
    def all_new(self) -> bool:
        """Nothing in it is an old weight."""
        return self in (Action.NEW, Action.ZERO, Action.CLOSED)


@dataclass(frozen=True)
class ExpertShare:
    """The part of an expert's output weight that one of its copies carries.

    Copies that are chosen together have the same 1 / copies of the old probability; so their
    outputs are averaged, and each carries ``copies`` times its part of the weight. Noisy experts,
    which are not chosen together, carry the same: the old weight and noise.

    Attributes:
        rank: which copy.
        copies: how many there are.
    """

    rank: int
    copies: int


@dataclass(frozen=True)
class TensorPlan:
    """How one written tensor comes about.

    Attributes:
        output: name, dtype and shape.
        role: its role in the family table.
        source: name of the tensor it is made of; None when it is new.
        dims: map of each dimension, None where it is unchanged.
        action: what is done.
        factor: every entry is multiplied by this, after sharing.
        init: how entries without a source start (``normal``, ``ones``, ``zeros``).
        lambda_change: what happens to the lambda vector, if this is one.
        layer: index of the written layer, if it belongs to one.
        layer_source: what that layer is made of.
        gain_offset: what the model adds to every entry; the factor applies to the sum.
        expert: index of the written expert, if it belongs to one.
        expert_copy: it belongs to a further copy of an expert.
        share: the part of the source that it carries, where copies of an expert share it.
        redrawn: part of the FFN units that is drawn anew (of a stack: in its further copies).
        piece: index of this matrix in a stack of matrices (see :meth:`matrices`).
        source_start, output_start: bytes of the stacks in front of it.
        noise: factor on the class's spread, of what a warm start adds to its entries.
        computed: how its entries are calculated, where no map says where they come from.
        repeated: of a random tensor: so many rows in succession are equal.
    """

    output: OutputTensor
    role: str
    source: str | None
    dims: tuple[DimMap | None, ...]
    action: Action
    factor: float = 1.0
    init: str = "normal"
    lambda_change: LambdaChange | None = None
    layer: int | None = None
    gain_offset: float = 0.0
    layer_source: LayerSource | None = None
    expert: int | None = None
    expert_copy: bool = False
    share: ExpertShare | None = None
    redrawn: float = 0.0
    piece: int | None = None
    source_start: int = 0
    output_start: int = 0
    noise: float = 0.0
    computed: Computed | None = None
    repeated: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the written tensor."""
        return prod(self.output.shape) * DTYPES[self.output.dtype].bits // 8

    @property
    def own_factor(self) -> float:
        """The factor without what makes up for the copies that share the source."""
        return self.factor / (self.share.copies if self.share else 1)

    @property
    def told(self) -> str:
        """The action as plans tell it: a lambda vector is rescaled, or grown."""
        if self.action is not Action.LAMBDA:
            return self.action.value
        moved = any(dim is not None for dim in self.dims)
        return (Action.GROWN if moved else Action.RESCALED).value

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype of its entries."""
        dtype = DTYPES[self.output.dtype].numpy
        assert dtype is not None
        return dtype

    @property
    def in_new_layer(self) -> bool:
        """It belongs to an inserted layer or to a further copy of one."""
        return self.layer_source is not None and self.layer_source.kind != "kept"

    @property
    def dim_labels(self) -> tuple[str, ...]:
        """What the dimensions are called."""
        if len(self.output.shape) > 3:  # a convolution, copied
            return tuple(f"dimension {place}" for place in range(len(self.output.shape)))
        names = ("experts", "rows", "columns")
        return names if len(self.output.shape) == 3 else names[1 : 1 + len(self.output.shape)]

    @property
    def key(self) -> str:
        """Names the tensor, or its place in a stack; randomness is keyed by it."""
        return self.output.name if self.piece is None else f"{self.output.name}[{self.piece}]"

    @property
    def source_key(self) -> str:
        """Names the source, or its place in a stack."""
        return f"{self.source}+{self.source_start}" if self.piece is not None else f"{self.source}"

    def matrices(self) -> Iterator[TensorPlan]:
        """The tensor itself, or of a stack [experts, rows, columns] a plan for each matrix."""
        shape = self.output.shape
        if len(shape) != 3 or self.action in WHOLE:
            yield self
            return
        stack, *dims = self.dims
        old = [dim.old_width if dim else size for dim, size in zip(dims, shape[1:], strict=True)]
        bytes_each = DTYPES[self.output.dtype].bits // 8
        for piece in range(shape[0]):
            origin = piece if stack is None else int(stack.source[piece])
            rank = 0 if stack is None else int(stack.rank[piece])
            yield replace(
                self,
                output=OutputTensor(self.output.name, self.output.dtype, shape[1:]),
                source=None if origin == NEW else self.source,
                action=Action.NEW if origin == NEW else self.action,
                dims=tuple(dims),
                share=replace(self.share, rank=rank) if self.share else None,
                redrawn=self.redrawn if rank else 0.0,
                expert=piece,
                expert_copy=rank > 0,
                piece=piece,
                source_start=max(origin, 0) * prod(old) * bytes_each,
                output_start=piece * prod(shape[1:]) * bytes_each,
            )


# Stacks of matrices that are dealt with as one.
WHOLE = (Action.COPIED, Action.ZERO, Action.COMPUTED)
