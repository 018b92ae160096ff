"""Right growth passes, wrong growth fails, and the report says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import verify_models as models

from growkit.core.errors import CheckpointError, UsageError, VerificationFailed
from growkit.verification import VerificationReport, verify_checkpoints

TEXT = "It is a truth universally acknowledged, that a single model must be in want of heads. " * 8


def compare(a: Path, b: Path, **options: Any) -> VerificationReport:
    defaults = {"text": TEXT, "tokens": 128, "window": 32, "generate_tokens": 4}
    return verify_checkpoints(a, b, **(defaults | options))


def test_the_same_weights_differ_by_nothing(model: Any, folder: Path, tmp_path: Path) -> None:
    report = compare(folder, models.save(model, tmp_path / "b"))
    assert report.passed is True
    assert report.max_difference == 0.0
    assert report.kl_max == 0.0
    assert report.top1_agreement == 1.0
    assert report.perplexity_a == report.perplexity_b
    assert report.generation is not None
    assert report.generation.cached_equals_uncached
    assert report.generation.equals_a
    assert report.first_differing_layer is None


def test_identity_layers_pass_bit_for_bit(model: Any, folder: Path, tmp_path: Path) -> None:
    grown, sources = models.grow_depth(model, after=[0, 2, 2])
    b = models.save(grown, tmp_path / "b")
    models.write_plan(b, layer_sources=sources, exactness="bit-exact")
    report = compare(folder, b, all_layers=True)
    assert report.passed is True
    assert report.max_difference == 0.0
    assert [entry.source for entry in report.layers] == [-1, 0, 0, 1, 2, 2, 2]
    assert all(entry.max_difference == 0.0 for entry in report.layers)


def test_a_layer_that_only_pretends_to_be_an_identity_is_named(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    grown, sources = models.grow_depth(model, after=[1])
    grown.model.layers[2].mlp.down_proj.weight.data[0] = 0.01
    b = models.save(grown, tmp_path / "b")
    models.write_plan(b, layer_sources=sources)
    report = compare(folder, b)
    assert report.passed is False
    assert report.first_differing_layer == 2
    assert "after layer 2 of B" in report.cause


def test_right_and_wrong_growth_are_far_apart_in_units_of_the_tolerance(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    exact = [models.grow_heads(model), models.grow_ffn(models.grow_heads(model))]
    for number, grown in enumerate(exact):
        report = compare(folder, models.save(grown, tmp_path / f"right{number}"))
        assert report.passed is True
        assert 0 < report.max_difference < report.tolerance / 3

    tiled = compare(folder, models.save(models.grow_heads(model, wrong=True), tmp_path / "tiled"))
    assert tiled.passed is False
    assert tiled.max_difference > 1e4 * tiled.tolerance
    assert tiled.first_differing_layer == 0

    # The rounding of a single bfloat16 weight, on one head of one layer.
    nudged = models.make_model()
    nudged.model.layers[1].self_attn.o_proj.weight.data[:, :16] *= 1 + 2**-8
    report = compare(folder, models.save(nudged, tmp_path / "nudged"))
    assert report.passed is False
    assert report.max_difference > 30 * report.tolerance
    assert report.first_differing_layer == 1
    assert "after layer 1 of B" in report.cause
    with pytest.raises(VerificationFailed, match="layer 1 of B"):
        report.raise_if_failed()


def test_embeddings_and_head_are_told_apart_from_layers(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    other = models.make_model()
    other.model.embed_tokens.weight.data *= 1.01
    assert compare(folder, models.save(other, tmp_path / "e")).first_differing_layer == -1
    other = models.make_model()
    other.lm_head.weight.data *= 1.01
    report = compare(folder, models.save(other, tmp_path / "h"))
    assert report.passed is False
    assert report.first_differing_layer is None
    assert "equal up to layer 2" in report.cause


def test_rounded_weights_need_the_plan_to_say_so(model: Any, tmp_path: Path) -> None:
    a = models.save(model, tmp_path / "a", torch.bfloat16)
    stored = models.rounded(model)
    b = models.save(models.grow_heads(stored, first_share=1 / 3), tmp_path / "b", torch.bfloat16)
    assert compare(a, b).passed is False
    models.write_plan(b, exactness="rounded")
    assert compare(a, b).passed is True
    wrong = models.save(models.grow_heads(stored, wrong=True), tmp_path / "w", torch.bfloat16)
    models.write_plan(wrong, exactness="rounded")
    assert compare(a, wrong).passed is False


def test_growth_that_promises_nothing_is_only_reported(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    b = models.save(models.grow_heads(model, wrong=True), tmp_path / "b")
    models.write_plan(b, exactness="not-exact")
    report = compare(folder, b)
    assert report.passed is None
    assert report.status == "not exact (informational)"
    assert report.max_difference > report.tolerance
    report.raise_if_failed()


def test_exact_split_in_bfloat16_passes_and_shows_the_effect_of_bfloat16(
    model: Any, tmp_path: Path
) -> None:
    a = models.save(model, tmp_path / "a", torch.bfloat16)
    grown = models.grow_heads(models.rounded(model), first_share=0.5)
    b = models.save(grown, tmp_path / "b", torch.bfloat16)
    report = compare(a, b)
    assert report.passed is True
    assert (report.storage_dtype_b, report.compute_dtype) == ("bfloat16", "float32")
    assert report.half_precision is not None
    assert report.half_precision.dtype == "bfloat16"
    assert report.half_precision.noise_floor > 100 * report.max_difference


def test_layers_without_a_plan_are_skipped_with_a_note(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    grown, _ = models.grow_depth(model, after=[0])
    report = compare(folder, models.save(grown, tmp_path / "b"), all_layers=True)
    assert report.passed is True
    assert report.layers == ()
    assert any("3 against 4" in note for note in report.notes)


def test_stacked_layers_are_compared_as_far_as_they_continue_a(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    grown, _ = models.grow_depth(model, after=[2])
    b = models.save(grown, tmp_path / "b")
    kinds = [{"source": i, "kind": "copy"} for i in (0, 1, 0, 2)]
    models.write_plan(b, layer_sources=kinds, exactness="not-exact")
    report = compare(folder, b, all_layers=True)
    assert [entry.layer for entry in report.layers] == [-1, 0, 1]
    assert any("from layer 2 on" in note for note in report.notes)


def test_a_missing_tensor_is_never_silent(model: Any, folder: Path, tmp_path: Path) -> None:
    b = models.save(model, tmp_path / "b")
    models.edit(b, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    for layerwise in ("off", "on"):
        with pytest.raises(VerificationFailed, match=r"lacks model\.layers\.1\.mlp\.up_proj"):
            compare(folder, b, layerwise=layerwise)


def test_unexpected_and_mismatched_tensors_are_named(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    extra = models.save(model, tmp_path / "extra")
    models.edit(extra, lambda tensors: tensors.update({"model.old": torch.zeros(2)}))
    shape = models.save(model, tmp_path / "shape")
    models.edit(shape, lambda tensors: tensors.update({"model.norm.weight": torch.ones(60)}))
    for layerwise in ("off", "on"):
        with pytest.raises(VerificationFailed, match=r"stores model\.old, which"):
            compare(folder, extra, layerwise=layerwise)
        with pytest.raises(VerificationFailed, match=r"model\.norm\.weight in another shape"):
            compare(folder, shape, layerwise=layerwise)


@pytest.mark.parametrize("broken", ["a", "b"])
def test_nan_weights_fail_and_name_the_folder_and_layer(
    model: Any, tmp_path: Path, broken: str
) -> None:
    a, b = models.save(model, tmp_path / "a"), models.save(model, tmp_path / "b")
    name = "model.layers.2.mlp.down_proj.weight"
    models.edit(tmp_path / broken, lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(
        VerificationFailed, match=f"logits of {broken} are not finite, from layer 2"
    ):
        compare(a, b, exactness="not-exact")


def test_different_vocabularies_are_a_wrong_use(folder: Path, tmp_path: Path) -> None:
    b = models.save(models.make_model(vocab_size=128), tmp_path / "b")
    with pytest.raises(UsageError, match="256 and 128"):
        compare(folder, b)


def test_a_truncated_file_is_an_error_of_the_checkpoint(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    b = models.save(model, tmp_path / "b")
    data = (b / "model.safetensors").read_bytes()
    (b / "model.safetensors").write_bytes(data[:-1000])
    with pytest.raises(CheckpointError):
        compare(folder, b)


def test_the_given_tolerance_replaces_the_rule(model: Any, folder: Path, tmp_path: Path) -> None:
    b = models.save(models.grow_heads(model), tmp_path / "b")
    assert compare(folder, b, tolerance=0.0).passed is False
    assert compare(folder, b, tolerance=1.0).tolerance == 1.0


def test_a_wider_residual_stream_is_compared_with_the_factor_of_the_plan(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    grown = models.grow_hidden(model)
    b = models.save(grown, tmp_path / "b")
    silent = compare(folder, b, all_layers=True)
    assert silent.passed is True
    assert silent.layers == ()
    assert any("hidden size 64 against 128" in note for note in silent.notes)
    models.write_plan(b, hidden_factor=1.0)
    known = compare(folder, b, all_layers=True)
    assert len(known.layers) == 4
    assert known.first_differing_layer is None

    grown.model.layers[1].mlp.gate_proj.weight.data *= 1.01
    wrong = models.save(grown, tmp_path / "wrong")
    models.write_plan(wrong, hidden_factor=1.0)
    assert compare(folder, wrong).first_differing_layer == 1
