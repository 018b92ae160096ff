"""Layouts of dimensions: what a table says of a dimension, as units of axes."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np

from growkit.core.errors import UsageError
from growkit.families.derived.form import evaluate
from growkit.families.unit_layout import IntArray, Layout, Sizes, Units


def layout_of(segments: Sequence[Any], *, single: bool = False) -> Layout:
    """The units of a dimension: their common block, and each unit as so many parts of it.

    ``single``: blocks of one element.
    """
    plain = len(segments) == 1 and len(segments[0][1]) == 1
    if plain and segments[0][1][0][0] == "fixed":
        block = segments[0][1][0][1]

        def fixed(sizes: Sizes) -> Units:
            zero = np.zeros(1, np.int64)
            return Units(("fixed",), zero, zero, zero, evaluate(block, sizes))

        return fixed

    named = {name for _, items in segments for _, block in items for p in block for name in p[1:]}
    heads = sorted(named & {"head_dim", "head_width"})

    def layout(sizes: Sizes) -> Units:
        axes: list[str] = []
        blocks = [evaluate(block, sizes) for _, items in segments for _, block in items]
        # Several heads of one unit (q, k and v of GPT-NeoX) are parts, that grow each by itself.
        blocks += [sizes[name] for name in heads]
        common = 1 if single else gcd(*blocks) or 1
        rows: list[IntArray] = []
        used: dict[str, int] = {}
        for over, items in segments:
            columns = []
            count = sizes[over] if over else 1
            for axis, block in items:
                if axis not in axes:
                    axes.append(axis)
                parts = evaluate(block, sizes) // common
                units = (sizes[axis] if axis != "fixed" else 1) // count
                first = used.get(axis, 0)
                used[axis] = first + parts
                index = np.arange(count * units).reshape(count, units, 1)
                table = np.empty((count, units, parts, 3), np.int64)
                table[..., 0] = axes.index(axis)
                table[..., 1] = index
                table[..., 2] = np.arange(first, first + parts)
                columns.append(table.reshape(count, units * parts, 3))
            rows.append(np.concatenate(columns, axis=1).reshape(-1, 3))
        all_rows = np.concatenate(rows)
        return Units(
            tuple(axes), all_rows[:, 0].copy(), all_rows[:, 1].copy(), all_rows[:, 2].copy(), common
        )

    return layout


def fixed(width: int) -> Layout:
    """A dimension that never grows, of this width."""
    return layout_of([["", [["fixed", [[width]]]]]])


def untold(name: str) -> Layout:
    """The dimension of a tensor that config.json says nothing of."""

    def layout(sizes: Sizes) -> Units:
        raise UsageError(
            f"config.json does not say how large {name} is.", "Give the folder with its weights."
        )

    return layout
