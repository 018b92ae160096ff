"""The parts of a derivation that need no model: sizes, orders of units, entries of layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from growkit.derive.axes import Role, evaluate, multilinear
from growkit.derive.builder import Underivable
from growkit.derive.proof import why_no_ffn
from growkit.derive.studied import Findings
from growkit.derive.widths import (
    DEAD,
    FIXED,
    MIXED,
    Segment,
    Width,
    _masks,
    _single,
    _spelled,
    blocks_of,
    segments_of,
)
from growkit.families.derived.units import layout_of
from growkit.families.layer_fields import move_counts, move_entry

HEADS, KV, DIM, ROPE = ("heads",), ("kv",), ("head_dim",), ("rope",)


def test_a_size_is_read_off_the_corners_of_its_fields() -> None:
    numbers, other = {HEADS: 4, KV: 2, DIM: 16}, {HEADS: 8, KV: 4, DIM: 17}

    def size(chosen: tuple[tuple[str, ...], ...]) -> int:
        at = {path: other[path] if path in chosen else numbers[path] for path in numbers}
        return 3 + at[HEADS] * at[DIM] + 2 * at[KV] * at[DIM]

    fields = list(numbers)
    corners = {}
    for bits in range(8):
        chosen = tuple(path for place, path in enumerate(fields) if bits >> place & 1)
        corners[chosen] = size(chosen)
    found = multilinear(corners, fields, numbers, other)
    assert found == {(): 3, (DIM, HEADS): 1, (DIM, KV): 2}
    assert found is not None and evaluate(found, {HEADS: 7, KV: 1, DIM: 3}) == 3 + 21 + 6


def labels_of(*parts: tuple[str, list[int], int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    names = ["q", "kv"]
    labels, axes = [], []
    for axis, units, block in parts:
        for unit in units:
            labels += [unit] * block
            axes += [names.index(axis) if axis in names else -1] * block
    return np.array(labels), np.array(axes), names


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([("q", [0, 1, 2, 3], 5)], [Segment((("q", 5),), "q")]),
        (
            [("q", [0, 1, 2, 3], 2), ("kv", [0, 1], 2), ("kv", [0, 1], 2)],
            [Segment((("q", 2),), "q"), Segment((("kv", 2),), "kv"), Segment((("kv", 2),), "kv")],
        ),
        (
            [("q", [0, 1], 2), ("kv", [0], 3), ("q", [2, 3], 2), ("kv", [1], 3)],
            [Segment((("q", 2), ("kv", 3)), "kv")],
        ),
        (
            [("q", [0, 1, 2, 3], 1), ("fixed", [FIXED], 6)],
            [Segment((("q", 1),), "q"), Segment((("fixed", 6),))],
        ),
    ],
)
def test_orders_of_units_have_words_that_hold_for_any_size(parts, expected) -> None:
    labels, axes, names = labels_of(*parts)
    found = segments_of(labels, axes, names, {"q": 4, "kv": 2})
    assert found == expected
    # The words say the same order again, and the same for larger sizes.
    said = [[s.over, [[axis, [[block]]] for axis, block in s.items]] for s in found]
    units = layout_of(said)({"q": 4, "kv": 2})
    element_index = np.repeat(units.index, units.block)
    element_axis = np.repeat(np.array(units.axes)[units.axis], units.block)
    known = labels != FIXED
    assert (element_index[known] == labels[known]).all()
    assert (element_axis[known] == np.array(names)[axes[known]]).all()
    larger = layout_of(said)({"q": 8, "kv": 4})
    assert larger.width > units.width or not known.any()


def test_an_order_without_a_word_is_refused() -> None:
    labels, axes, names = labels_of(("q", [2, 0, 3, 1], 1))
    with pytest.raises(Underivable):
        segments_of(labels, axes, names, {"q": 4, "kv": 2})


def test_blocks_of_fused_parts_follow_from_the_config() -> None:
    size = {(DIM, HEADS): 1, (DIM, KV): 2, (ROPE,): 1}
    numbers = {HEADS: 4, KV: 2, DIM: 16, ROPE: 6}
    segments = [
        Segment((("q", 16),), "q"),
        Segment((("kv", 16),), "kv"),
        Segment((("kv", 16),), "kv"),
        Segment((("fixed", 6),)),
    ]
    found = blocks_of(segments, size, {"q": HEADS, "kv": KV}, numbers)
    assert found == [[{(DIM,): 1}], [{(DIM,): 1}], [{(DIM,): 1}], [{(ROPE,): 1}]]


def test_probes_spell_the_number_of_every_unit() -> None:
    units, order = 20, np.random.default_rng(0).permutation(20)
    seen = np.zeros((len(_masks(units, False)), 22))
    for row, mask in enumerate(_masks(units, False)):
        seen[row, :20] = mask[order]  # a writer of one unit
        seen[row, 20] = 1.0  # what all units read
    labels, coupled = _spelled(seen, units)
    assert (labels[:20] == order).all() and not coupled
    assert labels[20] == MIXED and labels[21] == DEAD
    # A norm lets a little of every unit through; the order is still read off.
    labels, coupled = _spelled(seen[:, :20] + 0.05, units)
    assert (labels == order).all() and coupled


def test_rows_that_several_heads_share_are_labelled_by_their_group() -> None:
    seen = np.zeros((4, 5))
    for head in range(4):
        seen[head, head // 2] = 1.0 + head
        seen[head, 4] = 1.0
    labels, _ = _single(seen, 2)
    assert labels.tolist() == [0, 1, DEAD, DEAD, MIXED]


def test_entries_of_layers_move_with_them() -> None:
    sources = [0, 0, 1, 2, 2]
    assert move_entry(["a", "b", "c"], 3, sources) == ["a", "a", "b", "c", "c"]
    assert move_entry([0, 2], 3, sources) == [0, 1, 3, 4]
    assert move_entry({"02": {"head_dim": 8}}, 3, sources) == {
        "03": {"head_dim": 8},
        "04": {"head_dim": 8},
    }
    assert move_entry({"1": 5}, 3, sources) == {"2": 5}
    assert move_entry("word", 3, sources) is None and move_entry([1.0, 2.0], 3, sources) is None
    assert move_counts({"dense": 1, "last": 1}, {"dense": "leading"}, 3, sources) == {"dense": 2}
    assert move_counts({"last": 1}, {"last": "trailing"}, 3, sources) == {"last": 2}
    # A class that divides by the root of the number of layers reads a number that makes up for it.
    assert move_counts({"depth": 1.5}, {"depth": "root"}, 3, [*range(3)] * 4) == {"depth": 3.0}


def test_why_no_field_widens_the_ffn_is_read_off_the_sizes() -> None:
    hidden, expand = ("hidden_size",), ("expand",)

    def model(*matrices: tuple[dict, dict], fields: tuple = (hidden,)) -> SimpleNamespace:
        roles = [Role(f"m{i}", (1, 1), sizes=list(m)) for i, m in enumerate(matrices)]
        return SimpleNamespace(axes=SimpleNamespace(roles=roles, fields=dict.fromkeys(fields, 8)))

    one, three, four = {(hidden,): 1}, {(hidden,): 3}, {(hidden,): 4}
    assert "4 times as wide" in why_no_ffn(
        model((three, one), (one, one), (four, one), (one, four))
    )
    assert "no width" in why_no_ffn(model((three, one), (one, one)))
    wide = {(expand, hidden): 1}
    found = model((wide, one), (one, wide), fields=(hidden, expand))
    assert "expand times" in why_no_ffn(found)


def test_of_two_widths_the_one_that_can_be_said_is_the_ffn() -> None:
    nothing: Any = None
    found = Findings({}, nothing, nothing, nothing, {}, {}, [], set())
    found.widths = {"ffn": Width(), "ffn_2": Width()}
    found.paths = {"ffn": [("encoder_ffn_dim",)], "ffn_2": [("decoder_ffn_dim",)]}
    found.drop(["ffn"], "no word for it")
    assert list(found.widths) == ["ffn"] and found.paths["ffn"] == [("decoder_ffn_dim",)]
    assert found.failures == {"ffn:encoder_ffn_dim": "no word for it"}
