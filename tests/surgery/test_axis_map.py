"""Axis maps against naive loops: no old unit is lost and the shares of a source sum to one."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from growkit.surgery.axis_map import NEW, AxisMap


@st.composite
def axis_maps(draw: st.DrawFn, size: int | None = None) -> AxisMap:
    """Any map that keeps every old unit, with copies and new units anywhere."""
    size = size or draw(st.integers(1, 6))
    extra = draw(st.lists(st.integers(NEW, size - 1), max_size=8))
    source = draw(st.permutations([*range(size), *extra]))
    return AxisMap(np.array(source, dtype=np.int64), size)


@st.composite
def chained(draw: st.DrawFn) -> tuple[AxisMap, AxisMap]:
    first = draw(axis_maps())
    return first, draw(axis_maps(first.new_size))


@given(axis_maps())
def test_rank_multiplicity_and_share_match_a_loop(axis_map: AxisMap) -> None:
    source = axis_map.source.tolist()
    counts = Counter(s for s in source if s != NEW)
    seen: Counter[int] = Counter()
    shares: Counter[int] = Counter()
    for unit, old in enumerate(source):
        assert axis_map.rank[unit] == seen[old]
        seen[old] += 1
        assert axis_map.multiplicity[unit] == (counts[old] if old != NEW else 0)
        if old == NEW:
            assert axis_map.share[unit] == 0
        else:
            assert axis_map.share[unit] == 1 / counts[old]
            shares[old] += Fraction(1, int(axis_map.multiplicity[unit]))
    assert dict(shares) == dict.fromkeys(range(axis_map.old_size), 1)


@given(chained())
def test_then_is_composition(maps: tuple[AxisMap, AxisMap]) -> None:
    first, second = maps
    both = first.then(second)
    for unit, middle in enumerate(second.source):
        expected = NEW if middle == NEW else first.source[middle]
        assert both.source[unit] == expected
    assert (both.old_size, both.new_size) == (first.old_size, second.new_size)


def test_maps_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        AxisMap.identity(3).then(AxisMap.identity(4))


@pytest.mark.parametrize("source", [[0, 0], [0, 1, 2], [-2, 0, 1], [NEW, NEW]])
def test_a_map_that_loses_or_invents_units_is_refused(source: list[int]) -> None:
    with pytest.raises(ValueError):
        AxisMap(np.array(source), 2)


@given(st.integers(1, 7), st.integers(0, 9))
def test_spread_keeps_neighbours_together_and_even(size: int, added: int) -> None:
    source = AxisMap.spread(size, size + added).source
    assert sorted(source) == list(source)
    counts = Counter(source.tolist())
    assert max(counts.values()) - min(counts.values()) <= 1


@given(st.integers(1, 6), st.integers(1, 4))
def test_whole_factors_are_repeat_interleave_and_tile(size: int, copies: int) -> None:
    old = np.arange(size)
    assert (AxisMap.spread(size, size * copies).source == np.repeat(old, copies)).all()
    assert (AxisMap.tile(size, copies).source == np.tile(old, copies)).all()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 4))
def test_grouped_and_with_new_stay_inside_their_group(
    groups: int, per_group: int, added: int
) -> None:
    size, new_size = groups * per_group, groups * (per_group + added)
    copied = AxisMap.grouped(size, new_size, groups).source.reshape(groups, -1)
    with_new = AxisMap.with_new(size, new_size, groups).source.reshape(groups, -1)
    for group in range(groups):
        old = list(range(group * per_group, (group + 1) * per_group))
        assert set(copied[group]) == set(old)
        assert with_new[group].tolist() == old + [NEW] * added


def test_grouped_is_not_tile() -> None:
    """The negative control: tiling moves copies to another group."""
    tiled = AxisMap.tile(4, 2).source.reshape(2, -1)
    assert set(tiled[0]) == {0, 1, 2, 3}
