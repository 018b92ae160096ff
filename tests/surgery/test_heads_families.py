"""Head operators on every ordinary family, through transformers; full-width norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
from family_checkpoints import FAMILIES, family_config, write_checkpoint

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.plan import build_plan
from growkit.surgery.request import GrowthRequest
from growkit.verification import VerificationReport, verify_checkpoints

CASES: dict[str, dict[str, Any]] = {
    "query": {"query_heads": "x2"},
    "kv": {"kv_heads": "x2"},
    "together": {"heads": "x2", "ffn": "x1.5", "layers": "+1", "hidden": "x2"},
}


def verified(a: Path, b: Path) -> VerificationReport:
    return verify_checkpoints(a, b, tokens=64, window=32, generate_tokens=4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_function(tmp_path: Path, family: str, case: str) -> None:
    source = write_checkpoint(tmp_path / "a", family_config(family, bias=case == "query"))
    tiny.grow(source, tmp_path / "b", **CASES[case])
    report = verified(source, tmp_path / "b")
    assert report.passed and report.max_difference < 1e-4, report.cause


@pytest.mark.parametrize(
    ("request_", "cause"),
    [
        ({"query_heads": "+2"}, "multiple of 4"),
        ({"heads": "+2"}, "multiple of 4"),
        ({"query_heads": "x2", "new_heads": "zero"}, "norm that olmo2 runs over all query heads"),
        ({"heads": "x2", "new_heads": "zero"}, "norm that olmo2 runs over all query heads"),
    ],
)
def test_a_norm_over_all_heads_wants_whole_copies(
    tmp_path: Path, request_: dict[str, str], cause: str
) -> None:
    source = write_checkpoint(tmp_path / "a", family_config("olmo2"))
    with open_checkpoint(source) as checkpoint, pytest.raises(UsageError) as refusal:
        build_plan(checkpoint, GrowthRequest(**request_).operators())
    assert cause in refusal.value.cause


def test_uneven_copies_under_a_norm_over_all_heads_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: three copies of one head and one of the other, inside each group."""
    source = write_checkpoint(tmp_path / "a", family_config("olmo2"))

    def uneven(size: int, new: int, groups: int) -> AxisMap:
        whole = AxisMap.spread(size, new).source.copy()
        whole[2::4] = whole[1::4]
        return AxisMap(whole, size)

    monkeypatch.setattr(AxisMap, "grouped", staticmethod(uneven))
    tiny.grow(source, tmp_path / "b", query_heads="x2")
    assert not verified(source, tmp_path / "b").passed
