"""Layers between two neighbours: their mean, once the units of one are in the order of the other.

Neurons of two layers have no common order: the mean of unit 7 of both is the mean of strangers. So
the FFN units and the heads of one are first matched with those of the other, by an optimal
assignment (``scipy.optimize.linear_sum_assignment``) under the inner products of all weights that
make or read a unit, each tensor scaled to the same size. Key/value heads are matched with the best
matching of the query heads that they serve; heads of differential attention keep their places.
After OpT-DeUS (arXiv 2508.08011). Not exact: a computing layer is added.

Nothing is read for the plan; a matching needs the weights of two layers, and as many numbers as a
layer has pairs of units, once it is written. A block of rows of the partner is gathered row by row.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import Checkpoint
from growkit.core.errors import UsageError
from growkit.families import Family, Tensor
from growkit.families.base import Dim
from growkit.families.unit_layout import IntArray, Sizes
from growkit.surgery.effect import Computed

Floats = npt.NDArray[np.float32]


class AlignedLayers:
    """The matchings of a plan, each worked out once.

    Args:
        family, sizes: of the source, which no other growth of the plan changes.
    """

    def __init__(self, family: Family, sizes: Sizes) -> None:
        self.family, self.sizes = family, sizes
        self._lock = threading.Lock()
        self._orders: dict[tuple[str, int, int], dict[str, IntArray]] = {}

    def computed(self, tensor: Tensor, layer: int, partner: int) -> Computed:
        """The mean of one tensor of two layers, the partner's units in the order of ``layer``."""
        own, other = (tensor.name.replace("{layer}", str(n)) for n in (layer, partner))

        def rows(checkpoint: Checkpoint, source: int, first: int, count: int) -> Any:
            order = self._order(checkpoint, tensor.stack, layer, partner)
            places = [self._places(dim, order) for dim in tensor.dims]
            vector = len(places) == 1
            read = checkpoint.read_entries if vector else checkpoint.read_rows
            mine = read(own, first, count).astype(np.float32)
            theirs = np.concatenate(
                [read(other, int(place), 1) for place in places[0][first : first + count]]
            ).astype(np.float32)
            if not vector:
                theirs = theirs[:, places[1]]
            return (mine + theirs) / 2

        return Computed(rows, (tensor.role,))

    def _places(self, dim: Dim, order: dict[str, IntArray]) -> IntArray:
        """Element of the partner's dimension for every element of the layer's."""
        units = dim.layout(self.sizes)
        table = np.stack([units.axis, units.index, units.part], axis=1)
        keys = [tuple(row) for row in table.tolist()]
        where = {key: place for place, key in enumerate(keys)}
        found = np.array(
            [
                where[axis, int(order[units.axes[axis]][index]), part]
                if units.axes[axis] in order
                else place
                for place, (axis, index, part) in enumerate(keys)
            ]
        )
        inside: IntArray = (found[:, None] * units.block + np.arange(units.block)).reshape(-1)
        return inside

    def _order(
        self, checkpoint: Checkpoint, stack: str, layer: int, partner: int
    ) -> dict[str, IntArray]:
        """Axis -> the partner's unit for every unit of the layer."""
        key = stack, layer, partner
        with self._lock:
            if key not in self._orders:
                self._orders[key] = self._match(checkpoint, *key)
            return self._orders[key]

    def _match(
        self, checkpoint: Checkpoint, stack: str, layer: int, partner: int
    ) -> dict[str, IntArray]:
        def scores(axis: str) -> Floats:
            mine, theirs = (self._features(checkpoint, stack, n, axis) for n in (layer, partner))
            product: Floats = mine @ theirs.T
            return product

        order = {"ffn": assignment(scores("ffn"))}
        links = [link for link in self.family.links if link.source == "query_head"]
        if links and links[0].target == "kv_head":
            served = links[0].indices(self.sizes)[:, 0]
            order |= match_groups(scores("query_head"), scores("kv_head"), served)
        return order

    def _features(self, checkpoint: Checkpoint, stack: str, layer: int, axis: str) -> Floats:
        """[units of the axis, all weights that make or read one], float32."""
        parts = []
        for tensor in self.family.present(self.sizes):
            if not tensor.per_layer or tensor.stack != stack:
                continue
            for number, dim in enumerate(tensor.dims):
                units = dim.layout(self.sizes)
                if axis not in units.axes:
                    continue
                values = checkpoint.read(tensor.name.replace("{layer}", str(layer)))
                wide = np.moveaxis(values.astype(np.float32), number, 0).reshape(len(units), -1)
                here = np.flatnonzero(units.axis == units.axes.index(axis))
                here = here[np.lexsort((units.part[here], units.index[here]))]
                size = np.sqrt(np.square(wide).mean()) or 1.0
                parts.append(wide[here].reshape(self.sizes[axis], -1) / size)
        return np.concatenate(parts, axis=1)


def assignment(scores: Floats) -> IntArray:
    """Column of every row, so that the sum of the scores is largest.

    Raises:
        UsageError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UsageError(
            "--new-layers aligned needs scipy, which is not installed.",
            "Install it: pip install 'growkit[align]'.",
        ) from None
    return np.asarray(linear_sum_assignment(scores, maximize=True)[1], np.int64)


def match_groups(query: Floats, kv: Floats, served: IntArray) -> dict[str, IntArray]:
    """Query heads within groups, and the groups: a query head stays with its key/value head.

    Args:
        query, kv: scores [heads, heads].
        served: key/value head of every query head.
    """
    members = [np.flatnonzero(served == group) for group in range(len(kv))]
    total, inner = kv.copy(), {}
    for a, mine in enumerate(members):
        for b, theirs in enumerate(members):
            block = query[np.ix_(mine, theirs)]
            inner[a, b] = assignment(block)
            total[a, b] += block[np.arange(len(mine)), inner[a, b]].sum()
    groups = assignment(total)
    heads = np.empty(len(query), np.int64)
    for a, b in enumerate(groups.tolist()):
        heads[members[a]] = members[b][inner[a, b]]
    return {"kv_head": groups, "query_head": heads}
