"""Layouts against lists written out by hand."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from growkit.families.unit_layout import (
    Units,
    adjacent_parts,
    fixed,
    halves,
    head_dim,
    plain,
    split_parts,
    stripes,
)


def listed(units: Units) -> list[tuple[str, int, int]]:
    return [
        (units.axes[axis], int(index), int(part))
        for axis, index, part in zip(units.axis, units.index, units.part, strict=True)
    ]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_stripes(groups: int, first: int, second: int) -> None:
    """Ratios g:1 and 1:m: each group holds its consecutive heads of both kinds."""
    first, second = (first, 1) if first >= second else (1, second)
    sizes = {"s": groups * first, "n": groups * second, "head_dim": 3}
    expected = []
    for group in range(groups):
        expected += [("s", group * first + i, 0) for i in range(first)]
        expected += [("n", group * second + i, 0) for i in range(second)]
    units = stripes("s", "n")(sizes)
    assert listed(units) == expected
    assert units.width == 3 * len(expected)


def test_stripes_of_motif_2() -> None:
    """32 signal and 8 noise heads: [s0 s1 s2 s3 n0] [s4 ...]."""
    units = listed(stripes("s", "n")({"s": 32, "n": 8, "head_dim": 128}))
    assert units[:6] == [
        ("s", 0, 0),
        ("s", 1, 0),
        ("s", 2, 0),
        ("s", 3, 0),
        ("n", 0, 0),
        ("s", 4, 0),
    ]
    assert units[-1] == ("n", 7, 0)


@given(st.integers(1, 4), st.integers(1, 4))
def test_halves(first: int, second: int) -> None:
    units = halves("s", "n")({"s": first, "n": second, "head_dim": 2})
    assert listed(units) == [("s", i, 0) for i in range(first)] + [
        ("n", i, 0) for i in range(second)
    ]


@given(st.integers(1, 5), st.integers(1, 3))
def test_adjacent_and_split_parts(size: int, parts: int) -> None:
    sizes = {"kv": size, "head_dim": 2}
    adjacent = adjacent_parts("kv", lambda sizes: parts, head_dim)(sizes)
    split = split_parts("kv", parts, head_dim)(sizes)
    assert listed(adjacent) == [("kv", i, p) for i, p in product(range(size), range(parts))]
    assert listed(split) == [("kv", i, p) for p, i in product(range(parts), range(size))]


def test_plain_and_fixed() -> None:
    assert listed(plain("ffn")({"ffn": 3})) == [("ffn", 0, 0), ("ffn", 1, 0), ("ffn", 2, 0)]
    vocabulary = fixed(lambda sizes: sizes["vocab"])({"vocab": 7})
    assert len(vocabulary) == 1 and vocabulary.width == 7
