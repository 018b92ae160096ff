"""Layers of several kinds: identity layers keep the order that the class makes of the depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import family_checkpoints as families
import pytest
import tiny_checkpoints as tiny

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError
from growkit.diff.folders import diff_checkpoints
from growkit.surgery.layer_pattern import pattern_positions, rule_kinds
from growkit.surgery.plan import Plan, build_plan, declare_tensors
from growkit.surgery.request import GrowthRequest
from growkit.verification import verify_checkpoints

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
# Model type, layers of the source, config; every class that makes the kinds of its layers itself.
ORDERED = {
    "gemma3": ("gemma3_text", 12, {}),
    "gemma3 of windows alone": ("gemma3_text", 4, {}),
    "gemma2": ("gemma2", 4, {}),
    "smollm3": ("smollm3", 8, {}),
    "olmo3": ("olmo3", 8, {"sliding_window": 16}),
    "qwen2": ("qwen2", 6, {"use_sliding_window": True, "max_window_layers": 3}),
}


def planned(folder: Path, config: dict[str, Any], **request: Any) -> Plan:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SIZES, **config}))
    asked = GrowthRequest(**request)
    with open_checkpoint(folder, require_tensors=False) as checkpoint:
        declare_tensors(checkpoint)
        return build_plan(checkpoint, asked.operators(), symmetry=asked.symmetry_choice())


@pytest.mark.parametrize("layers", ["+1", "+2", "x1.5", "x2"])
@pytest.mark.parametrize("name", ORDERED)
def test_the_class_would_make_the_same_list(tmp_path: Path, name: str, layers: str) -> None:
    model_type, count, changes = ORDERED[name]
    config = {"model_type": model_type, "num_hidden_layers": count, **changes}
    plan = planned(tmp_path / "a", config, layers=layers)
    written = {f: plan.config[f] for f in plan.family.layer_rules if f in plan.config}
    for field, values in written.items():
        rule = rule_kinds(plan.family, plan.config, plan.sizes["layer"])
        index = list(plan.family.layer_rules).index(field)
        assert values == [kind[index] for kind in rule]
    kept = [layer.source for layer in plan.growth.layers if layer.kind == "kept"]
    assert kept == list(range(count))
    assert plan.growth.layers[0].kind == "kept"
    assert plan.exactness.value == "bit-exact" and not plan.warnings


@pytest.mark.parametrize(
    ("name", "engine"), [("gemma3", "llama.cpp"), ("smollm3", "llama.cpp"), ("olmo3", "")]
)
def test_even_placement_breaks_the_order_and_says_so(
    tmp_path: Path, name: str, engine: str
) -> None:
    model_type, count, changes = ORDERED[name]
    config = {"model_type": model_type, "num_hidden_layers": count, **changes}
    plan = planned(tmp_path / "a", config, layers="x2", layer_placement="even")
    assert any("layers alternate" in text and engine in text for text in plan.warnings)


def test_a_pattern_that_cannot_be_kept(tmp_path: Path) -> None:
    """All layers have full attention: no index that the class gives a window to is theirs."""
    config = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "layer_types": ["full_attention"] * 3,
    }
    plan = planned(tmp_path / "a", config, layers="+3")
    assert plan.config["layer_types"] == ["full_attention"] * 6
    assert any("layers alternate" in text for text in plan.warnings)
    with pytest.raises(UsageError, match="no placement of 3 new layers"):
        planned(tmp_path / "b", config, layers="+3", layer_placement="pattern")


def test_without_kinds_pattern_is_refused_and_auto_is_even(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 4}
    with pytest.raises(UsageError, match="order of layer kinds"):
        planned(tmp_path / "a", config, layers="+2", layer_placement="pattern")
    auto = planned(tmp_path / "b", config, layers="+2").growth.layers
    assert (
        auto == planned(tmp_path / "c", config, layers="+2", layer_placement="even").growth.layers
    )


def test_positions_are_as_even_as_the_kinds_allow() -> None:
    s, f = ("s",), ("f",)
    assert pattern_positions([s, f], [s, f, s, f], [0, 2]) == [0, 3]
    assert pattern_positions([s, s, f], [s, s, s, f, s], [0, 3, 4]) == [0, 2, 3]
    assert pattern_positions([f, s], [s, f, s], [0, 1]) is None
    assert pattern_positions([s, f, s], [s, f], [0, 1, 2]) is None


@pytest.mark.parametrize("family", ["gemma3", "smollm3"])
def test_bit_exact_on_the_written_files(tmp_path: Path, family: str) -> None:
    """Tiny Gemma 3 has a period of three; its fourth layer copies the window of the one before."""
    source = families.write_checkpoint(tmp_path / "a", families.family_config(family))
    tiny.grow(source, tmp_path / "b", layers="x1.5")
    report = verify_checkpoints(source, tmp_path / "b", tokens=64, window=32, generate_tokens=2)
    assert report.passed and report.max_difference == 0


def test_folders_of_before_are_explained_by_even_placement(tmp_path: Path) -> None:
    """growkit 0.1.0 knew no order of kinds and recorded no placement."""
    source = families.write_checkpoint(tmp_path / "a", families.family_config("gemma3"))
    tiny.grow(source, tmp_path / "b", layers="+2", layer_placement="even")
    manifest = json.loads((tmp_path / "b" / "growkit.json").read_text())
    del manifest["request"]["layer_placement"]
    (tmp_path / "b" / "growkit.json").write_text(json.dumps(manifest))
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "b") as b:
        assert diff_checkpoints(a, b)["as_grown"]
