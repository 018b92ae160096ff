"""What growing an axis makes of the gradients of the tensors that produce it.

A copy j of a unit gets a part c of the gradient that the unit got. For an axis that some tensor
reads (heads by o_proj, FFN units by down_proj, the residual stream by every input projection) c is
the share of the copy's readers. For one that only works with the units of another axis (key/value
and noise heads, which signal and query heads use) c depends on who uses the copy: for every user x
of the old unit, c(j, x) is the sum of the shares of those copies of x that use j, divided by the
copies of the unit that each of them uses. Were all x alike, the gradient would be c times the old
one; otherwise only the sum over the copies is known, and E[c], E[c^2] over x are estimates.

Source: docs/algebra.md section 10 (rule, checked to 1e-15); the general form of c is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from growkit.families.unit_layout import IntArray
from growkit.surgery.axis_map import NEW, AxisMap
from growkit.surgery.plan import Plan
from growkit.surgery.symmetry import FRACTIONS, Symmetry, fraction_range

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AxisFactors:
    """Parts of the old gradient that the units of a grown axis get.

    Attributes:
        mean: E[c] of every unit, 0 for new ones; shape [new size].
        square: E[c^2]; shape [new size].
        exact: c is one number per unit.
        why: the reason when it is not.
    """

    mean: Floats
    square: Floats
    exact: bool
    why: str = ""


def axis_factors(plan: Plan) -> dict[str, AxisFactors]:
    """The factors of every axis that grows in ``plan``."""
    read = _read_axes(plan)
    linked = {link.target for link in plan.family.links}
    # Axes that tensors read come first: those that are only linked depend on them.
    order = sorted(plan.growth.axes, key=lambda axis: axis in linked and axis not in read)
    factors: dict[str, AxisFactors] = {}
    for axis in order:
        axis_map = plan.growth.axes[axis]
        if axis in read or axis not in linked:
            factors[axis] = _shared(axis, axis_map, plan.symmetry)
        else:
            factors[axis] = _used(axis, plan, factors)
    return factors


def _read_axes(plan: Plan) -> set[str]:
    axes: set[str] = set()
    for tensor in plan.family.tensors:
        if tensor.when(plan.sizes):
            for dim in tensor.dims:
                if dim.consumes:
                    axes.update(dim.layout(plan.sizes).axes)
    return axes


def _shared(axis: str, axis_map: AxisMap, symmetry: Symmetry) -> AxisFactors:
    square = np.zeros(axis_map.new_size)
    for copies in np.unique(axis_map.multiplicity[axis_map.multiplicity > 0]):
        here = axis_map.multiplicity == copies
        square[here] = mean_squares(int(copies), symmetry)[axis_map.rank[here]]
    exact = symmetry.equal or int(axis_map.multiplicity.max(initial=0)) <= 1
    words = axis.replace("_", " ")
    why = "" if exact else f"{words} copies share by {symmetry.mode}, each entry in its own way"
    return AxisFactors(axis_map.share, square, exact, why)


def _used(axis: str, plan: Plan, known: Mapping[str, AxisFactors]) -> AxisFactors:
    axis_map = plan.growth.axes[axis]
    means: list[Floats] = []
    squares: list[Floats] = []
    reasons: list[str] = []
    exact = True
    for link in plan.family.links:
        if link.target != axis:
            continue
        old, new = link.indices(plan.source_sizes), link.indices(plan.sizes)
        users = plan.growth.axes.get(link.source) or AxisMap.identity(len(old))
        user = known.get(link.source)
        if user is not None and not user.exact:
            exact = False
            reasons.append(user.why)
        mean, square = _parts(axis_map, users, new, user)
        used = np.zeros((axis_map.old_size, len(old)), bool)
        used[old, np.arange(len(old))[:, None]] = True
        concerned = used[np.maximum(axis_map.source, 0)]
        means.append(np.where(concerned, mean, np.nan))
        squares.append(np.where(concerned, square, np.nan))
    known_units = axis_map.source != NEW
    mean, square = (np.concatenate(parts, axis=1)[known_units] for parts in (means, squares))
    if np.nanmax(np.nanmax(mean, axis=1) - np.nanmin(mean, axis=1)) > 1e-12:
        exact = False
        words = axis.replace("_", " ")
        reasons.append(f"copies of a {words} serve other heads; only their sum is known")
    result = AxisFactors(
        np.zeros(axis_map.new_size),
        np.zeros(axis_map.new_size),
        exact,
        "; ".join(dict.fromkeys(reasons)),
    )
    result.mean[known_units] = np.nanmean(mean, axis=1)
    result.square[known_units] = np.nanmean(square, axis=1)
    return result


def _parts(
    axis_map: AxisMap, users: AxisMap, links: IntArray, factors: AxisFactors | None
) -> tuple[Floats, Floats]:
    """E[c(j, x)] and E[c(j, x)^2]; both [units of the grown axis, old users]."""
    share = factors.mean if factors else np.ones(users.new_size)
    share_square = factors.square if factors else np.ones(users.new_size)
    shape = (axis_map.new_size, users.old_size)
    mean, variance = np.zeros(shape), np.zeros(shape)
    rows = np.flatnonzero(users.source != NEW)
    for row in rows:
        sources = axis_map.source[links[row]]
        for unit, source in zip(links[row], sources, strict=True):
            copies = int((sources == source).sum())
            mean[unit, users.source[row]] += share[row] / copies
            spread = share_square[row] - share[row] ** 2
            variance[unit, users.source[row]] += spread / copies**2
    # All copies of a user together carry exactly its old weight.
    variance[np.isclose(mean, 1.0)] = 0.0
    return mean, mean**2 + variance


def mean_squares(copies: int, symmetry: Symmetry) -> Floats:
    """E[s^2] of every copy of a unit, in the order of :func:`growkit.surgery.symmetry.shares`.

    E[s] is 1 / copies in every mode. Shape [copies].
    """
    even = np.full(copies, copies**-2.0)
    if copies == 1 or symmetry.equal:
        return even
    if symmetry.mode == "noise":
        # The noise of a share has the power of the share, lowered by the signal-to-noise ratio.
        return even * (1.0 + 10.0 ** (-symmetry.noise_snr_db / 10.0))
    squares, rest = [], 1.0
    for remaining in range(copies, 1, -1):
        lowest, step = fraction_range(remaining)
        kept = lowest + step * np.arange(FRACTIONS)
        kept_square, peeled_square = float(np.mean(kept**2)), float(np.mean((1 - kept) ** 2))
        if remaining == 2:  # a coin decides which of the two gets the larger part
            last = (kept_square + peeled_square) / 2
            squares += [rest * last, rest * last]
        else:
            squares.append(rest * peeled_square)
            rest *= kept_square
    return np.array(squares)
