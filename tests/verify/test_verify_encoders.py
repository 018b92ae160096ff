"""Encoders and models that read pixels or sound: each is fed its own kind of input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from growkit.derive.axes import Names
from growkit.derive.layer_stacks import Layers
from growkit.surgery.effect import LayerSource
from growkit.surgery.operators.depth import _of_a_kind
from growkit.training.models import check_folder
from growkit.verification import verify_checkpoints
from growkit.verification.model_inputs import arguments, outputs, stack_depths

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def masked() -> Any:
    config = transformers.BertConfig(vocab_size=260, max_position_embeddings=40, **SMALL)
    return transformers.BertForMaskedLM(config)


def vision() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **SMALL))


def speech() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=260, d_model=16, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_source_positions=20, max_target_positions=40,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


@pytest.mark.parametrize("make", [masked, vision, speech])
def test_a_changed_weight_is_seen_and_a_copy_passes(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "copy")
    report = verify_checkpoints(tmp_path / "a", tmp_path / "copy", tokens=64)
    assert report.passed and report.max_difference == 0.0
    assert (report.generation is None) == (make is not speech)
    assert bool(report.output) == (make is not speech) == ("output" in report.to_dict())
    with torch.no_grad():
        name = "fc2.weight" if make is not masked else "layer.1.output.dense.weight"
        next(value for key, value in model.named_parameters() if key.endswith(name)).mul_(1.5)
    model.save_pretrained(tmp_path / "b")
    assert verify_checkpoints(tmp_path / "a", tmp_path / "b", tokens=64).passed is False


def test_the_start_token_takes_one_of_the_positions(tmp_path: Path) -> None:
    """As many tokens as the decoder has learned positions, and the window is cut below them."""
    speech().save_pretrained(tmp_path / "a")
    report = verify_checkpoints(tmp_path / "a", tmp_path / "a", tokens=160, window=128)
    assert report.passed and report.window == 2 * 39


def test_noise_is_the_same_for_the_same_window_and_another_for_another() -> None:
    torch.manual_seed(0)
    model = vision().eval()
    first, second = torch.tensor([[1, 2, 3]]), torch.tensor([[3, 2, 1]])
    pixels = [arguments(model, ids)["pixel_values"] for ids in (first, first, second)]
    assert pixels[0].shape == (1, 3, 16, 16)
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])
    assert outputs(model, first).shape == (1, 5, 16)
    assert stack_depths(speech()) == {"encoder": 2, "decoder": 1}


def test_two_stacks_are_told_apart_and_a_first_layer_of_its_own_kind_is_not_copied() -> None:
    stored = [f"m.{part}.layers.{layer}.w" for part in ("encoder", "decoder") for layer in (0, 1)]
    second = Layers((), "decoder_layers", 2, part="decoder")
    names = Names(stored, Layers((), "encoder_layers", 2, part="encoder", second=second), set())
    assert names.role_name("m.decoder.layers.1.w") == (1, "m.decoder.layers.{layer}.w", None)
    assert names.split("m.decoder.layers.1.w")[0] is None
    assert names.of_second().split("m.decoder.layers.1.w")[0] == 1
    made = _of_a_kind(
        (LayerSource(0, "kept"), LayerSource(0, "identity"), LayerSource(1, "kept")), 1
    )
    assert [layer.source for layer in made] == [0, 1, 1]


def test_names_of_labels_are_no_layers_however_many_there_are() -> None:
    values = {"num_hidden_layers": 2, "kinds": ["x", "y"], "id2label": {"0": "cat", "1": "dog"}}
    moved = Layers((), "num_hidden_layers", 2).moved(values, [0, 0, 1])
    assert moved["kinds"] == ["x", "x", "y"] and moved["id2label"] == values["id2label"]


def test_training_an_encoder_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked().save_pretrained(tmp_path)
    monkeypatch.setattr("growkit.families.is_encoder", lambda config: True)
    with pytest.raises(Exception, match="is an encoder; growkit trains decoder-only models"):
        check_folder(tmp_path)
