"""The written tensors of a plan: counted by kind at once, made one by one only for who reads them.

A mixture of experts has hundreds of thousands of tensors and a thousand kinds of them, so whatever
sizes and costs are computed from are the kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import overload

from growkit.surgery.tensor_plans import PlanBuilder, TensorPlan


class PlannedTensors(Sequence[TensorPlan]):
    """Every written tensor, in writing order.

    Attributes:
        groups: the same by kind, in the order of their first tensors.
    """

    def __init__(self, builder: PlanBuilder) -> None:
        self._builder = builder
        self.groups = tuple(builder.groups())

    def __len__(self) -> int:
        return sum(group.count for group in self.groups)

    def __iter__(self) -> Iterator[TensorPlan]:
        return self._builder.tensors()

    @overload
    def __getitem__(self, index: int) -> TensorPlan: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TensorPlan, ...]: ...
    def __getitem__(self, index: int | slice) -> TensorPlan | tuple[TensorPlan, ...]:
        if isinstance(index, slice):
            return tuple(self)[index]
        position = range(len(self))[index]
        return next(islice(self, position, None))
