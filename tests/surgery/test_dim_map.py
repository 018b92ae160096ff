"""Dimension maps against naive loops, for blocks, parts and re-ordered layouts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_axis_map import axis_maps

from growkit.core.errors import GrowkitError
from growkit.families.base import consumes, produces
from growkit.families.unit_layout import adjacent_parts, head_dim, plain, split_parts
from growkit.surgery.axis_map import NEW, AxisMap
from growkit.surgery.dim_map import DimMap, map_dim
from growkit.surgery.expand import RowTargets


def elements(dim: DimMap) -> list[int]:
    """Old element of each written element, by a loop."""
    return [
        NEW if unit == NEW else int(unit) * dim.block + inside
        for unit in dim.source
        for inside in range(dim.block)
    ]


@given(axis_maps(), st.integers(1, 3))
def test_runs_of_rows_cover_the_dimension(axis_map: AxisMap, block: int) -> None:
    dim = DimMap(axis_map.source, block, False, axis_map.old_size * block)
    rebuilt = [NEW] * dim.width
    for _, old, new, count in RowTargets(dim, dim.old_width).runs:
        assert rebuilt[new : new + count] == [NEW] * count
        rebuilt[new : new + count] = range(old, old + count)
    assert rebuilt == elements(dim)


@given(axis_maps(), st.integers(1, 3))
def test_new_ranges_are_new_units_and_further_copies(axis_map: AxisMap, block: int) -> None:
    dim = DimMap(axis_map.source, block, True, axis_map.old_size * block)
    seen: set[int] = set()
    expected = set()
    for unit, old in enumerate(axis_map.source.tolist()):
        if old == NEW or old in seen:
            expected |= set(range(unit * block, (unit + 1) * block))
        seen.add(old)
    ranges = dim.new_ranges
    assert {i for start, end in ranges for i in range(start, end)} == expected
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))


@given(axis_maps(), st.sampled_from([1, 2]), st.booleans(), st.booleans())
def test_map_dim_follows_parts_from_one_layout_to_another(
    axis_map: AxisMap, parts: int, split_before: bool, split_after: bool
) -> None:
    def layout(split: bool, size: int) -> list[tuple[int, int]]:
        if split:
            return [(part, unit) for part in range(parts) for unit in range(size)]
        return [(part, unit) for unit in range(size) for part in range(parts)]

    def units(split: bool, size: int):  # type: ignore[no-untyped-def]
        make = (
            split_parts("a", parts, head_dim)
            if split
            else adjacent_parts("a", lambda sizes: parts, head_dim)
        )
        return make({"a": size, "head_dim": 3})

    before = layout(split_before, axis_map.old_size)
    expected = [
        NEW if axis_map.source[unit] == NEW else before.index((part, int(axis_map.source[unit])))
        for part, unit in layout(split_after, axis_map.new_size)
    ]
    dim = map_dim(
        units(split_before, axis_map.old_size),
        units(split_after, axis_map.new_size),
        {"a": axis_map},
        consumes(plain("a")),
    )
    if dim is None:
        assert expected == list(range(len(before)))
    else:
        assert dim.source.tolist() == expected
        assert dim.block == 3


def test_nothing_moves() -> None:
    units = plain("a")({"a": 4})
    dim = consumes(plain("a"))
    assert map_dim(units, units, {}, dim) is None
    assert map_dim(units, units, {"a": AxisMap(np.array([1, 0, 2, 3]), 4)}, dim) is not None


def test_another_block_is_refused() -> None:
    with pytest.raises(GrowkitError, match="cannot become"):
        map_dim(
            plain("a", head_dim)({"a": 2, "head_dim": 4}),
            plain("a", head_dim)({"a": 2, "head_dim": 8}),
            {},
            produces(plain("a", head_dim)),
        )
