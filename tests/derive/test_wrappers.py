"""A language model inside a multimodal folder grows in place, by a shipped table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

from growkit.cli.main import main
from growkit.derive.derivation import OldForm, read_config
from growkit.derive.pictures import _reconciled
from growkit.derive.proof import _unseen_tower
from growkit.families.derived.form import layers_fed
from growkit.families.derived.store import SHIPPED
from growkit.verification.sight import Sight, find_sight, is_seen

pytestmark = pytest.mark.skipif(not list(SHIPPED.glob("llava-*")), reason="no table of llava")


def proven(model_type: str, option: str) -> bool:
    """The shipped table of a type offers this."""
    tables = [json.loads(path.read_text()) for path in SHIPPED.glob(f"{model_type}-*.json")]
    return any("error" in table["operators"].get(option, {}) for table in tables)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=299)
    model = LlavaForConditionalGeneration(config)
    folder = tmp_path_factory.mktemp("llava") / "a"
    model.save_pretrained(folder)
    return folder


def test_towers_are_copied_and_the_text_part_grows(llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    asked = ["--layers", "+1", "--ffn", "x2", "--query-heads", "x2", "--kv-heads", "x2"]
    assert main(["grow", str(llava), *asked, "--out", str(out)]) == 0  # and is verified
    before, after = (load_file(folder / "model.safetensors") for folder in (llava, out))
    towers = [name for name in before if "vision" in name or "projector" in name]
    assert len(towers) > 20
    assert all(torch.equal(before[name], after[name]) for name in towers)
    config = json.loads((out / "config.json").read_text())
    written = config["text_config"]
    assert (written["num_hidden_layers"], written["intermediate_size"]) == (3, 96)
    assert (written["num_attention_heads"], written["num_key_value_heads"]) == (8, 4)
    assert config["vision_config"]["num_hidden_layers"] == 2
    # The image is seen as before: the wrapper's own class, with pixels.
    small, large = (
        LlavaForConditionalGeneration.from_pretrained(folder).eval() for folder in (llava, out)
    )
    torch.manual_seed(1)
    ids = torch.randint(3, 299, (1, 12))
    ids[0, 2:6] = 299  # one patch each
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        logits = [model(input_ids=ids, pixel_values=pixels).logits for model in (small, large)]
        blind = small(input_ids=ids.where(ids != 299, torch.tensor(5))).logits
    assert (logits[0] - logits[1]).abs().max() < 2e-5 < (logits[0] - blind).abs().max()
    assert main(["diff", str(llava), str(out)]) == 0


def features(folder: Path) -> torch.Tensor:
    """What the language model sees of the same pixels."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.get_image_features(pixel_values=pixels).pooler_output[0]


@pytest.mark.skipif(not list(SHIPPED.glob("clip_vision*")), reason="no table of the tower")
def test_a_tower_grows_and_is_looked_at_behind_the_same_layer(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    grow = ["grow", str(llava), "--out", str(out), "--layers", "x2", "--ffn", "x1.5"]
    assert main([*grow, "--part", "audio"]) == 2
    assert "Valid values: text, vision." in capsys.readouterr().err
    assert main([*grow, "--part", "vision"]) == 0
    config = json.loads((out / "config.json").read_text())
    tower = config["vision_config"]
    assert (tower["num_hidden_layers"], tower["intermediate_size"]) == (4, 60)
    assert (config["vision_feature_layer"], config["text_config"]["num_hidden_layers"]) == (-3, 2)
    notes = json.loads((out / "growkit.json").read_text())["verification"]["notes"]
    assert any("vision tower on noise: max |d|" in note for note in notes)
    seen = features(llava)
    assert torch.allclose(seen, features(out), atol=1e-6 * float(seen.abs().max()))
    before, after = (load_file(folder / "model.safetensors") for folder in (llava, out))
    text = [name for name in before if "vision" not in name]
    assert all(torch.equal(before[name], after[name]) for name in text)
    # Whatever the tower computes otherwise is seen, although text alone is as before.
    name = next(name for name in after if "vision" in name and name.endswith("fc2.weight"))
    save_file({**after, name: 1.01 * after[name]}, out / "model.safetensors", {"format": "pt"})
    assert main(["verify", str(llava), str(out)]) == 3
    assert "vision tower on noise" in " ".join(capsys.readouterr().err.split())


def test_the_hidden_size_grows_and_what_the_tower_writes_along(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    assert main(["grow", str(llava), "--hidden", "x2", "--out", str(out)]) == 0  # and is verified
    notes = json.loads((out / "growkit.json").read_text())["verification"]["notes"]
    assert any("pixel_values of noise beside tokens: max |d logit|" in note for note in notes)
    before, after = (load_file(folder / "model.safetensors") for folder in (llava, out))
    last = next(name for name in before if name.endswith("projector.linear_2.weight"))
    shares = after[last][:, :32] + after[last][:, 32:]
    assert torch.allclose(shares, before[last].repeat(2, 1), atol=1e-6)
    assert all(torch.equal(before[name], after[name]) for name in before if "vision" in name)
    # Text alone would not see a projector that was left as it was, or whose rows moved.
    for wrong in (torch.roll(after[last], 1, 0), after[last].tril()):
        save_file({**after, last: wrong}, out / "model.safetensors", {"format": "pt"})
        assert main(["verify", str(llava), str(out)]) == 3
        assert "of noise beside tokens" in " ".join(capsys.readouterr().err.split())
    left = {**after, last: before[last]}
    save_file(left, out / "model.safetensors", {"format": "pt"})
    assert main(["verify", str(llava), str(out)]) == 3
    assert "another shape" in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(not proven("gemma3", "--hidden"), reason="not proven for gemma3")
def test_gemma_sees_as_before_with_another_hidden_size(tmp_path: Path) -> None:
    """Embeddings are scaled by a root of the hidden size, what the tower writes is not."""
    torch.manual_seed(0)
    text = Gemma3TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        image_size=56, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=299,
        boi_token_index=297, eoi_token_index=298,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    small, large = tmp_path / "a", tmp_path / "b"
    model.save_pretrained(small)
    asked = ["--hidden", "x2", "--out", str(large)]
    assert main(["grow", str(small), *asked]) == 0
    name = "multi_modal_projector.mm_input_projection_weight"
    before, after = (load_file(folder / "model.safetensors") for folder in (small, large))
    name = next(stored for stored in before if stored.endswith(name))
    assert torch.equal(after[name], before[name].repeat(1, 2))
    save_file(
        {**after, name: after[name] * 0.5**0.5}, large / "model.safetensors", {"format": "pt"}
    )
    assert main(["verify", str(small), str(large)]) == 3


@pytest.mark.skipif(not list(SHIPPED.glob("llama4-*")), reason="no table of llama4")
def test_the_hidden_size_is_refused_where_nothing_ran_through_the_towers() -> None:
    refused = [json.loads(path.read_text())["operators"] for path in SHIPPED.glob("llama4-*")]
    assert "its towers write vectors of the hidden size" in refused[0]["--hidden"]["why"]


def small_text(kind: Any, **more: Any) -> Any:
    return kind(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, **more,
    )  # fmt: skip


def hearing() -> Any:
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=16, d_model=24, encoder_layers=1, encoder_attention_heads=2,
        encoder_ffn_dim=32, max_source_positions=8,
    )  # fmt: skip
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(
            text_config=small_text(Qwen2Config).to_dict(),
            audio_config=audio.to_dict(),
            audio_token_index=299,
        )
    )


def test_a_sound_takes_as_many_places_as_its_tower_writes_vectors() -> None:
    """The class has no function for what it makes of sound: it is told by what it made last."""
    model = hearing().eval()
    ids = torch.arange(8, 32).reshape(2, 12)
    sight = find_sight(model, ids)
    assert sight is not None and (sight.places, sight.token) == (4, 299)
    assert sight.names == ["input_features", "feature_attention_mask"]
    given = sight.arguments(model, ids)
    assert (given["input_ids"] == 299).sum(1).tolist() == [4, 4]
    assert not is_seen(model, replace(sight, places=3), ids)


@pytest.mark.skipif(not proven("qwen2_audio", "--hidden"), reason="not proven for qwen2_audio")
def test_what_a_tower_of_sound_writes_grows_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small, large = tmp_path / "a", tmp_path / "b"
    hearing().save_pretrained(small)
    assert main(["grow", str(small), "--hidden", "x2", "--out", str(large)]) == 0
    notes = json.loads((large / "growkit.json").read_text())["verification"]["notes"]
    assert any("feature_attention_mask of noise beside tokens" in note for note in notes)
    before, after = (load_file(folder / "model.safetensors") for folder in (small, large))
    name = "multi_modal_projector.linear.weight"
    assert torch.equal(after[name], before[name].repeat(2, 1))


def test_both_kinds_of_tower_are_given_something() -> None:
    """Placeholders of a picture and of a sound, each with the number that the class knows it by."""
    image = Sight({"pixel_values": ("noise", (3, 4, 4))}, places=2, token=7, typed=1)
    sound = Sight({"input_features": ("noise", (5, 6))}, places=3, token=9, typed=3)
    both = replace(image, beside=sound)
    model = torch.nn.Linear(2, 2)
    given = both.arguments(model, torch.tensor([[1, 2], [3, 4]]))
    assert given["input_ids"].tolist() == [[9, 9, 9, 7, 7, 1, 2], [9, 9, 9, 7, 7, 3, 4]]
    assert given["mm_token_type_ids"].tolist() == [[3, 3, 3, 1, 1, 0, 0]] * 2
    assert given["pixel_values"].shape == (2, 3, 4, 4)
    assert given["input_features"].shape == (2, 5, 6)
    assert both.names == ["pixel_values", "input_features"]


def test_a_projector_that_the_twins_tower_no_longer_fits_is_made_to_fit() -> None:
    """A tower made smaller, whose projector's field says its width once more."""
    text = small_text(LlamaConfig).to_dict()
    values = {"text_config": text, "reads": 48, "tower": {"hidden_size": 24, "intermediate": 48}}

    class Model(torch.nn.Module):
        def __init__(self, values: dict[str, Any]) -> None:
            super().__init__()
            vision = SimpleNamespace(image_size=8, patch_size=4)
            self.config = SimpleNamespace(vision_config=vision)
            self.embedding = torch.nn.Embedding(300, 32)
            self.tower = torch.nn.Linear(8, values["tower"]["hidden_size"])
            self.project = torch.nn.Linear(values["reads"], 32)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embedding

        def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.project(self.tower(pixel_values.mean((1, 2))))

        def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.get_image_features(pixel_values) + self.embedding(input_ids).sum(1)

    class OfOneClass:
        def build(self, values: dict[str, Any]) -> torch.nn.Module:
            return Model(values)

    found = list(_reconciled(OfOneClass(), values, ("text_config",)))  # type: ignore[arg-type]
    assert found[0] == {**values, "reads": 24}


def test_a_tower_that_nothing_ran_through_stops_the_hidden_size() -> None:
    """Janus makes pictures by weights that no forward pass over text and pictures reaches."""
    roles = [SimpleNamespace(name=f"{part}.weight") for part in ("seen.a", "maker.a", "maker.b")]
    found = SimpleNamespace(axes=SimpleNamespace(roles=roles), dead={1, 2})
    assert _unseen_tower({"carried": ["seen.", "maker."]}, found) == "maker."
    assert _unseen_tower({"carried": ["seen."]}, found) == ""


def test_the_text_part_is_trained_and_the_towers_are_kept(llava: Path, tmp_path: Path) -> None:
    grown, run = tmp_path / "b", tmp_path / "run"
    asked = ["--layers", "+1", "--ffn", "x2", "--no-verify"]
    assert main(["grow", str(llava), *asked, "--out", str(grown)]) == 0
    text = tmp_path / "text.txt"
    text.write_text("A sentence that is read again and again. " * 100)
    recipe = tmp_path / "train.yaml"
    recipe.write_text(
        f"model: {{checkpoint: {grown}}}\ntokenizer: {{bytes: true}}\n"
        f"data: {{files: [{text}], sequence_length: 16}}\n"
        "training: {max_steps: 2, learning_rate: 1.0e-3, train: {new_then_all: 1}}\n"
    )
    assert main(["train", str(recipe), "--out", str(run)]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (grown, run))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert all(("vision" in name or "projector" in name) == (name in same) for name in before)


def test_no_layer_comes_between_those_that_images_are_added_behind() -> None:
    vision = {"model_type": "qwen3_vl_vision", "deepstack_visual_indexes": [8, 16, 24]}
    assert layers_fed({"model_type": "qwen3_vl", "vision_config": vision}) == 3
    assert layers_fed({"model_type": "llava", "vision_config": {}}) == 0


@pytest.mark.skipif(not proven("qwen2_vl", "--hidden"), reason="not proven for qwen2_vl")
def test_a_folder_of_qwen2_vl_as_the_hub_has_it_grows(tmp_path: Path) -> None:
    """The language model's fields stand beside vision_config; what is written has a section."""
    torch.manual_seed(0)
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2}
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = small_text(LlamaConfig, rope_parameters=rotary | {"rope_theta": 1e4}).to_dict()
    config = Qwen2VLConfig(
        text_config={**text, "model_type": "qwen2_vl_text"},
        vision_config=vision,
        image_token_id=299,
        video_token_id=298,
    )
    small, large = tmp_path / "a", tmp_path / "b"
    Qwen2VLForConditionalGeneration(config).save_pretrained(small)
    saved = json.loads((small / "config.json").read_text())
    fields = saved.pop("text_config")
    fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
    fields["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    for name in ("model_type", "layer_types"):
        fields.pop(name)
    (small / "config.json").write_text(json.dumps(fields | saved))
    assert main(["inspect", str(small)]) == 0
    asked = ["--layers", "+1", "--hidden", "x2", "--heads", "x2", "--out", str(large)]
    assert main(["grow", str(small), *asked]) == 0  # and is verified, with a picture
    written = json.loads((large / "config.json").read_text())
    assert (written["text_config"]["hidden_size"], written["vision_config"]["hidden_size"]) == (
        64,
        64,
    )
    assert "hidden_size" not in written and written["text_config"]["num_hidden_layers"] == 3
    assert main(["diff", str(small), str(large)]) == 0


def test_a_config_of_the_older_form_is_told_how_to_be_written_anew() -> None:
    """As Qwen2-VL's folders on the Hub have it: the text fields beside vision_config."""
    flat = {"model_type": "qwen2_5_vl", "hidden_size": 64, "num_hidden_layers": 2}
    with pytest.raises(OldForm, match="text_config is missing") as raised:
        read_config(flat)
    assert "save_pretrained" in raised.value.remedy
    nested = {"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 64}}
    assert read_config(nested).text_config.hidden_size == 64
    assert read_config({"model_type": "llama", "hidden_size": 64}).hidden_size == 64
