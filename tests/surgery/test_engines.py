"""What engines make of written configs: warned of by plan and grow, listed in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family_checkpoints as families
import pytest
import tiny_checkpoints as tiny

from growkit.core import engines
from growkit.record.manifest import read_manifest

DERIVES = ("qwen2", "olmo2", "olmo3", "granite")
ALONE = ({"heads": "x2"}, {"query_heads": "x2"}, {"hidden": "x2"})


def grown(tmp_path: Path, family: str, **request: Any) -> list[str]:
    source = families.write_checkpoint(tmp_path / "a", families.family_config(family))
    plan = tiny.grow(source, tmp_path / "b", **request)
    written = (read_manifest(tmp_path / "b") or {})["plan"]["warnings"]
    assert written == list(plan.warnings)
    return [text for text in plan.warnings if "head_dim = 8 is not" in text]


@pytest.mark.parametrize("request_", ALONE, ids=str)
@pytest.mark.parametrize("family", DERIVES)
def test_a_derived_head_dim_is_warned_of(
    tmp_path: Path, family: str, request_: dict[str, str]
) -> None:
    (text,) = grown(tmp_path, family, **request_)
    assert "llama.cpp" in text and "--hidden x2 --heads x2 together load everywhere" in text
    assert ("vLLM's own Qwen2 class (0.32, run)" in text) == (family == "qwen2")
    assert ("answers wrongly without an error" in text) == (family == "qwen2")


@pytest.mark.parametrize("family", DERIVES)
def test_the_combination_needs_no_warning(tmp_path: Path, family: str) -> None:
    assert not grown(tmp_path, family, hidden="x2", heads="x2")
    assert tiny.read_config(tmp_path / "b")["hidden_size"] == 64


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma2"])
def test_classes_that_read_head_dim_need_none(tmp_path: Path, family: str) -> None:
    assert not grown(tmp_path, family, hidden="x2")


def test_the_table_is_complete_and_stands_in_the_documentation() -> None:
    for fact in (*engines.DERIVED_HEAD_DIM, *engines.FIXED_PATTERN):
        assert fact.engine and fact.seen and fact.model_types and fact.outcome
    docs = Path(__file__).parents[2] / "docs" / "serving.md"
    assert engines.markdown_table() in docs.read_text(encoding="utf-8")
