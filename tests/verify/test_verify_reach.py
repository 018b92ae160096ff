"""What short text does not show: windows, layer kinds, rotary scaling, rows that nobody reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
import verify_models as models
from family_checkpoints import (
    family_config,
    layer_norm_config,
    write_checkpoint,
)

from growkit.growing import grow_checkpoint
from growkit.surgery.request import GrowthRequest
from growkit.verification import VerificationReport, verify_checkpoints
from growkit.verification import affordable as cost
from growkit.verification.long_window import longest_boundary


def compare(a: Path, b: Path, **options: Any) -> VerificationReport:
    return verify_checkpoints(a, b, **({"tokens": 128, "generate_tokens": 2} | options))


def change_config(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def grown(source: Path, out: Path, **request: Any) -> Path:
    grow_checkpoint(source, out, GrowthRequest(**request), verify=False, threads=1)
    return out


# -- lengths ---------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 200,
}


@pytest.mark.parametrize(
    ("config", "length", "field"),
    [
        ({}, None, None),
        ({"sliding_window": None}, None, None),
        ({"sliding_window": 200, "layer_types": ["full_attention"]}, None, None),
        ({"sliding_window": 200, "layer_types": ["sliding_attention"]}, 200, "sliding_window"),
        ({"attention_chunk_size": 8192}, 8192, "attention_chunk_size"),
        ({"text_config": {"sliding_window": 512}}, 512, "text_config.sliding_window"),
        (
            {"dual_chunk_attention_config": {"chunk_size": 64, "local_size": 8}},
            64,
            "dual_chunk_attention_config.chunk_size",
        ),
        ({"original_max_position_embeddings": 4096}, None, None),
        (
            {"rope_parameters": {"rope_type": "longrope"}, "original_max_position_embeddings": 64},
            64,
            "original_max_position_embeddings",
        ),
        (
            {"rope_parameters": {"full_attention": LLAMA3}, "max_position_embeddings": 900},
            200,
            "rope_parameters.full_attention.original_max_position_embeddings",
        ),
        (
            {"rope_scaling": {"type": "dynamic"}, "max_position_embeddings": 900},
            900,
            "max_position_embeddings",
        ),
        ({"rope_scaling": {"type": "linear"}, "max_position_embeddings": 900}, None, None),
    ],
)
def test_boundaries_of_configs(config: Any, length: int | None, field: str | None) -> None:
    found = longest_boundary(config)
    assert (found and found.length, found and found.field) == (length, field)


def test_a_window_that_was_lost_shows_behind_it(tmp_path: Path) -> None:
    model = models.make_model(sliding_window=200)
    a, b = (models.save(model, tmp_path / name) for name in "ab")
    right = compare(a, b)
    assert right.passed is True
    assert right.long_window is not None
    assert (right.long_window.tokens, right.long_window.compared) == (328, 128)
    assert right.long_window.boundary == "sliding_window"
    assert right.cached[0].prefill_tokens == 324
    assert "128 tokens in windows of 128 and one of 328" in right.compared
    change_config(b, sliding_window=None)
    wrong = compare(a, b)
    assert wrong.passed is False
    assert wrong.max_difference <= wrong.tolerance  # short text shows nothing
    assert "behind 200 tokens" in wrong.cause and "after layer 0 of B" in wrong.cause


def test_layer_kinds_that_were_swapped_show(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    config = family_config("gemma3", sliding_window=200, layer_types=kinds)
    config["rope_parameters"] = {
        kind: {"rope_type": "default", "rope_theta": 1e4}
        for kind in ("full_attention", "sliding_attention")
    }
    a = write_checkpoint(tmp_path / "a", config)
    b = grown(a, tmp_path / "b", ffn="x2")
    assert compare(a, b).passed is True
    change_config(b, layer_types=[kinds[1], kinds[0], *kinds[2:]])
    wrong = compare(a, b)
    assert wrong.passed is False
    assert "behind 200 tokens" in wrong.cause
    assert any("layer_types" in note for note in wrong.notes)


@pytest.mark.parametrize("field", ["factor", "low_freq_factor"])
def test_a_rotary_scaling_that_changed_fails(tmp_path: Path, field: str) -> None:
    config = family_config("llama", rope_parameters=LLAMA3)
    a = write_checkpoint(tmp_path / "a", config)
    b = grown(a, tmp_path / "b", ffn="x2")
    assert compare(a, b).long_window is not None
    change_config(b, rope_parameters=LLAMA3 | {field: LLAMA3[field] * 1.5})
    assert compare(a, b).passed is False


@pytest.mark.parametrize("change", ["sliding_window", "layer_types", "rope_parameters"])
def test_what_is_too_long_to_compute_is_compared_field_by_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(cost, "AFFORDABLE_FLOPS", 1.0)
    config = family_config("olmo3", sliding_window=200)
    a = write_checkpoint(tmp_path / "a", config)
    for number, request in enumerate(({"ffn": "x2"}, {"layers": "+2"})):
        right = compare(a, grown(a, tmp_path / f"b{number}", **request))
        assert right.passed is True, right.cause
        assert right.long_window is None and right.config.judged
        assert right.verified_length == 128
        assert any("verified up to 128 tokens" in note for note in right.notes)
    b = tmp_path / "b1"
    stored = json.loads((b / "config.json").read_text())
    other = {
        "sliding_window": 300,
        "layer_types": ["full_attention"] * len(stored["layer_types"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.001},
    }
    change_config(b, **{change: other[change]})
    wrong = compare(a, b)
    assert wrong.passed is False
    # transformers 5.16 derives rotary parameters from the types, and they are named first.
    named = {change, "rope_parameters"} if change == "layer_types" else {change}
    assert any(name in wrong.cause for name in named)
    # Without the plan A's own fields are the measure, where depths allow.
    (b / "growkit.json").unlink()
    if change != "layer_types":
        assert compare(a, b).passed is False


def test_the_length_may_be_chosen(tmp_path: Path) -> None:
    a = models.save(models.make_model(), tmp_path / "a")
    assert compare(a, a).long_window is None
    long = compare(a, a, long_window=300).long_window
    assert long is not None and long.tokens == 300
    assert compare(a, a, long_window=9999).long_window.tokens == 512  # positions of the model
    window = models.save(models.make_model(sliding_window=200), tmp_path / "w")
    none = compare(window, window, long_window=0)
    assert none.long_window is None and none.config.judged


def test_layer_by_layer_has_the_long_window_and_says_that_no_cache_was_compared(
    tmp_path: Path,
) -> None:
    a = models.save(models.make_model(sliding_window=200), tmp_path / "a")
    report = compare(a, a, layerwise="on")
    assert report.passed is True
    assert report.long_window is not None and report.long_window.tokens == 328
    assert report.cached == () and "no cache" in report.compared
    assert any("caches and generation not compared" in note for note in report.notes)
    assert report.rows.against == "a"


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_bound_the_window(tmp_path: Path, family: str) -> None:
    field = "n_positions" if family == "gpt2" else "max_position_embeddings"
    a = write_checkpoint(tmp_path / "a", layer_norm_config(family, **{field: 24}))
    b = grown(a, tmp_path / "b", ffn="x2")
    report = verify_checkpoints(a, b)
    assert report.passed is True, report.cause
    assert report.window == 24
    assert report.generation is not None
    assert report.generation.prompt_tokens + report.generation.tokens <= 24


# -- rows ------------------------------------------------------------------------------------------


def zero_rows(folder: Path, name: str, first: int) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][first:] = 0

    models.edit(folder, zero)


@pytest.mark.parametrize("hidden", [{}, {"hidden": "x2"}, {"hidden": "x3"}])
def test_rows_that_the_text_never_reads_are_held_to_the_plan(
    tmp_path: Path, hidden: dict[str, str]
) -> None:
    a = tiny.make_folder(tmp_path / "a", tiny.llama_config(), dtype="BF16")
    b = grown(a, tmp_path / "b", **({"ffn": "x2"} | hidden))
    right = compare(a, b)
    assert right.passed is True, right.cause
    assert right.rows.against == "plan" and right.rows.rows == 256
    assert "all 256 rows (bytes, by the plan)" in right.compared
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wrong = tmp_path / f"wrong {name}"
        grown(a, wrong, **({"ffn": "x2"} | hidden))
        zero_rows(wrong, name, 250)  # the text has no such bytes
        report = compare(a, wrong)
        assert report.passed is False
        if name.startswith("model"):
            assert report.max_difference <= report.tolerance
            assert name in report.cause


@pytest.mark.parametrize("layerwise", ["off", "on"])
def test_without_a_plan_rows_are_held_to_those_of_a(tmp_path: Path, layerwise: str) -> None:
    model = models.make_model()
    a = models.save(model, tmp_path / "a")
    b = models.save(models.grow_heads(model), tmp_path / "b")
    right = compare(a, b, layerwise=layerwise)
    assert right.passed is True and right.rows.against == "a"
    zero_rows(b, "model.embed_tokens.weight", 250)
    wrong = compare(a, b, layerwise=layerwise)
    assert wrong.passed is False
    assert "6 of 256 rows are not those of A" in wrong.cause

    wide = models.save(models.grow_hidden(model), tmp_path / "wide")
    report = compare(a, wide, layerwise=layerwise)
    assert report.passed is True and report.rows.against == ""
    assert f"{report.rows.rows} of 256 rows (those read)" in report.compared
    zero_rows(wide, "model.embed_tokens.weight", 250)
    assert "6 of 256 rows are zero" in compare(a, wide, layerwise=layerwise).cause


def test_rows_in_another_form_are_not_judged_by_their_values(tmp_path: Path) -> None:
    """Twice the embeddings into RMSNorm, half of every gain's partner: the same function."""
    model = models.make_model(num_hidden_layers=1)
    a = models.save(model, tmp_path / "a")
    model.model.embed_tokens.weight.data *= -1
    for name, matrix in model.named_parameters():
        if "embed" not in name and "norm" not in name:
            reads = any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate", "up_proj"))
            matrix.data *= -1 if reads or "o_proj" in name or "down" in name else 1
    model.lm_head.weight.data *= -1
    b = models.save(model, tmp_path / "b")
    report = compare(a, b)
    assert report.max_difference <= report.tolerance
    assert report.rows.against == "" and report.passed is True


def test_positions_that_the_text_does_not_reach_are_held_to_the_plan(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", layer_norm_config("gpt2", n_positions=200))
    b = grown(a, tmp_path / "b", ffn="x2")
    assert compare(a, b, window=64).passed is True
    name = next(n for n in tiny.read_folder(b) if "wpe" in n)
    zero_rows(b, name, 150)
    wrong = compare(a, b, window=64)
    assert wrong.passed is False and name in wrong.cause
