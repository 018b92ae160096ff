"""The map of new parameters: both forms of growkit.json read to the same, and it stays small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
from hypothesis import given
from hypothesis import strategies as st

from growkit.core.errors import CheckpointError
from growkit.record.manifest import manifest_text, read_manifest
from growkit.record.new_parameters import abbreviated, new_parameters, written_out
from growkit.surgery.plan import Plan

MANY = tiny.llama_config(num_hidden_layers=12, intermediate_size=1500)


def as_written_by_format_1(folder: Path) -> None:
    """Every name and every range written out, as growkit 0.1 did."""
    manifest = read_manifest(folder)
    (folder / "growkit.json").write_text(json.dumps(manifest | {"format": 1}, indent=2))


def grown(folder: Path, **request: Any) -> Plan:
    tiny.make_folder(folder / "a", MANY)
    return tiny.grow(folder / "a", folder / "b", **request)


@pytest.mark.parametrize("ffn, most", [("x1.5", 9_000), ("+777", 60_000)], ids=str)
def test_both_forms_read_to_the_same_and_the_file_stays_small(
    ffn: str, most: int, tmp_path: Path
) -> None:
    """+777 of 1,500 leaves no equal distances, so most ranges stand by themselves."""
    plan = grown(tmp_path, ffn=ffn, layers="+3")
    file = tmp_path / "b" / "growkit.json"
    new = (read_manifest(tmp_path / "b") or {})["new_parameters"]
    assert new == new_parameters(plan) and file.stat().st_size < most
    as_written_by_format_1(tmp_path / "b")
    assert file.stat().st_size > 20 * most
    assert (read_manifest(tmp_path / "b") or {})["new_parameters"] == new


def test_what_is_written_can_be_read_by_people() -> None:
    up = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    new = {up.format(i, j): {"rows": [[0, 4]]} for i in range(3) for j in (4, 5)}
    new |= {up.format(9, 4): {"rows": [[1, 2], [4, 5], [7, 8], [9, 11]]}, "lm_head.weight": "all"}
    assert abbreviated(new) == {
        up.format("{0..2}", "{4..5}"): {"rows": [[0, 4]]},
        up.format(9, 4): {"rows": [[1, 2, 3, 3], [9, 11]]},
        "lm_head.weight": "all",
    }
    text = manifest_text({"format": 2, "new_parameters": new})
    assert "[1, 2, 3, 3],\n" in text and json.loads(text)["new_parameters"] == abbreviated(new)


NAMES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), unique=True, max_size=30)
CUTS = st.lists(st.integers(0, 60), unique=True, max_size=24).map(sorted)


@given(NAMES, st.lists(CUTS, min_size=1, max_size=3))
def test_every_map_comes_back(names: list[tuple[int, int]], cuts: list[list[int]]) -> None:
    parts: list[Any] = [
        {"rows": [[a, b] for a, b in zip(c[::2], c[1::2], strict=False)]} for c in cuts
    ]
    parts = [part if part["rows"] else "all" for part in parts]
    new = {f"h.{i}.w{j}.07.x": parts[(i * j) % len(parts)] for i, j in names}
    assert written_out(json.loads(json.dumps(abbreviated(new))), "growkit.json", "") == new


@pytest.mark.parametrize(
    "new, message",
    [
        ({"h.{0..99999999}.w": "all"}, r"'h\.\{0\.\.99999999\}\.w', which stands for 100,000,000"),
        ({"h.{3..2}.w": "all"}, "stands for 0 entries"),
        ({"w": {"rows": [[0, 1, 2, 10**9]]}}, "stands for 1,000,000,000 entries"),
        ({"w": {"rows": [[0, 1, 2]]}}, r"the range \[0, 1, 2\] of 'w', and a range has 2 or 4"),
        ({"w": {"rows": [[0]]}}, r"the range \[0\] of 'w'"),
    ],
    ids=str,
)
def test_hostile_abbreviations(new: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "growkit.json").write_text(json.dumps({"format": 2, "new_parameters": new}))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "growkit.json").write_text('{"format": 3}')
    with pytest.raises(CheckpointError, match="has format 3, and this growkit reads up to 2"):
        read_manifest(tmp_path)
    assert read_manifest(tmp_path, tolerant=True) is None
