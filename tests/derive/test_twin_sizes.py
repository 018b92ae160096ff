"""What a twin says of other parts, of single layers and twice; and what a drafter reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from growkit import GrowthRequest
from growkit.cli.main import main
from growkit.core.errors import UsageError
from growkit.derive.builder import integers
from growkit.derive.layer_stacks import text_place, towers_beside
from growkit.derive.small_sizes import _first_two, _said_again
from growkit.families.config_fields import check_fields
from growkit.families.derived.family import derived_family
from growkit.families.derived.form import of_every_layer
from growkit.families.derived.store import SHIPPED
from growkit.growing import grow_checkpoint
from growkit.verification import model_inputs


def test_ids_of_tokens_and_what_is_said_of_layers_are_no_sizes() -> None:
    config = {"vocabulary_map": {"<image>": 4, "<a>": 5}, "per_layer_config": {"1": {"heads": 2}}}
    assert dict(integers({**config, "attn_config": {"kv_heads": 2}})) == {
        ("attn_config", "kv_heads"): 2
    }


def test_a_tower_of_two_layers_says_of_each_what_it_said() -> None:
    tower = {
        "num_hidden_layers": 4,
        "layer_types": ["dense", "dense", "sparse", "sparse"],
        "per_layer_config": {"0": {"experts": 1}, "2": {"experts": 4}},
        "looked_at": [1, 3],  # layers that a projector looks at: found by what runs
        "id2label": {"0": "a", "1": "b", "2": "c", "3": "d"},
    }
    assert _first_two(tower, ("vision_config", "num_hidden_layers")) == {
        ("vision_config", "num_hidden_layers"): 2,
        ("vision_config", "layer_types"): ["dense", "dense"],
        ("vision_config", "per_layer_config"): {"0": {"experts": 1}},
    }


def test_widths_that_are_said_twice_are_made_smaller_together() -> None:
    values = {
        "text_config": {"hidden_size": 512, "per_layer_config": {"3": {"num_attention_heads": 16}}},
        "vision_config": {"hidden_size": 96, "adapter_in": 96, "adapter_out": 512, "patches": 7},
    }
    sizes = {("text_config", "hidden_size"): 64, ("vision_config", "hidden_size"): 48}
    assert _said_again(values, sizes) == {
        ("vision_config", "adapter_in"): 48,
        ("vision_config", "adapter_out"): 64,
        ("text_config", "per_layer_config", "3", "num_attention_heads"): 4,
    }


def test_towers_stand_beside_fields_of_a_language_model_or_beside_its_section() -> None:
    tower = {"hidden_size": 8}
    flat = {"hidden_size": 64, "audio_config": tower, "attn_config": tower, "image_size": 4}
    assert towers_beside(flat) == {"audio_config"}
    assert not towers_beside({"text_config": tower, "vision_config": tower})
    assert text_place({"encoder_config": tower, "global_config": tower}) == ("global_config",)


def test_one_number_stands_for_a_list_that_says_it_of_every_layer() -> None:
    assert of_every_layer([96, 96]) == 96
    assert of_every_layer([96, 48]) == [96, 48]
    assert of_every_layer([True, True]) == [True, True]
    assert of_every_layer([]) == []


@pytest.mark.skipif(
    not list(SHIPPED.glob("gemma4_unified_assistant-*")), reason="no table of the drafter ships"
)
def test_a_drafter_is_given_what_its_target_computes_and_grows(tmp_path: Path) -> None:
    source, out = tmp_path / "a", tmp_path / "b"
    text = transformers.Gemma4UnifiedTextConfig(
        vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=512,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config = transformers.Gemma4UnifiedAssistantConfig(text_config=text, backbone_hidden_size=40)
    torch.manual_seed(0)
    try:
        model = transformers.Gemma4UnifiedAssistantForCausalLM(config).eval()
    except ValueError as error:  # transformers 5.23 makes none whose layers all share their keys
        pytest.skip(str(error))
    model.save_pretrained(source)
    ids = torch.arange(8, 20).reshape(2, 6)
    given = model_inputs.arguments(model, ids)
    assert given["inputs_embeds"].shape == (2, 6, 80)
    keys = {kind: pair[0].shape for kind, pair in given["shared_kv_states"].items()}
    assert keys == {"sliding_attention": (2, 2, 6, 8), "full_attention": (2, 2, 6, 512)}
    assert main(["grow", str(source), "--ffn", "x1.5", "--out", str(out), "--quiet"]) == 0
    grown = transformers.Gemma4UnifiedAssistantForCausalLM.from_pretrained(out).eval()
    assert grown.config.text_config.intermediate_size == 72
    with torch.no_grad():
        both = [model_inputs.outputs(m, ids) for m in (model, grown)]
    assert torch.allclose(*both, atol=1e-5)
    assert not model_inputs.can_generate(model)


@pytest.mark.skipif(not list(SHIPPED.glob("xlstm-*")), reason="no table of xLSTM ships")
def test_a_width_that_is_a_factor_of_another_size_is_stated_by_the_factor(tmp_path: Path) -> None:
    config = transformers.xLSTMConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_heads=4, ffn_proj_factor=2.667
    )  # fmt: skip
    source, out, deeper = (tmp_path / name for name in "abc")
    transformers.xLSTMForCausalLM(config).save_pretrained(source)
    shapes = {name: array.shape for name, array in load_file(source / "model.safetensors").items()}
    down = next(name for name in shapes if "proj_down" in name)
    assert shapes[down] == (64, 192)  # 170.7, rounded up
    grow_checkpoint(source, out, GrowthRequest(ffn="x1.5"), verify=False)
    both = [transformers.xLSTMForCausalLM.from_pretrained(path).eval() for path in (source, out)]
    with torch.no_grad():
        logits = [model_inputs.outputs(model, torch.arange(8, 20)[None]) for model in both]
    assert torch.allclose(*logits, atol=1e-5)
    written = json.loads((out / "config.json").read_text())
    assert load_file(out / "model.safetensors")[down].shape == (64, 288)
    assert written["ffn_round_up_to_multiple_of"] == 1
    assert int(64 * written["ffn_proj_factor"]) == 288
    grow_checkpoint(source, deeper, GrowthRequest(layers="x2"), verify=False)
    kept = json.loads((deeper / "config.json").read_text())
    assert (kept["num_hidden_layers"], kept["num_blocks"]) == (4, 4)
    assert (kept["ffn_proj_factor"], kept["ffn_round_up_to_multiple_of"]) == (2.667, 64)


@pytest.mark.skipif(not list(SHIPPED.glob("dory-*")), reason="no table of Dory ships")
@pytest.mark.parametrize("each", [1, 2])
def test_a_config_of_two_entries_a_layer_is_read_and_kept(tmp_path: Path, each: int) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = {
        "model_type": "dory", "architectures": ["DoryForCausalLM"], "vocab_size": 64,
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 3 * each,
        "n_input_layers": each, "n_recurrent_layers": each, "n_output_layers": each,
        "layer_types": [word for kind in kinds for word in (kind, "mlp")[:each]],
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    }  # fmt: skip
    family, source, out = derived_family(config), tmp_path / "a", tmp_path / "b"
    assert family is not None
    shapes = dict(family.declared(family.sizes_of(config)))
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, source / "model.safetensors")
    assert {name.split(".")[2] for name in shapes if ".layers." in name} == {"0", "1", "2"}
    grow_checkpoint(source, out, GrowthRequest(ffn="x2"), verify=False)
    written = json.loads((out / "config.json").read_text())
    assert written.pop("intermediate_size") == 48
    assert {**written, "intermediate_size": 24} == {**written, **config}


def test_a_list_that_says_the_same_of_every_layer_is_a_size_of_derived_families_alone() -> None:
    check_fields({"intermediate_size": [96, 96]}, by_layer=True)
    for value, by_layer in (([96, 48], True), ([96, 96], False), ([], True)):
        with pytest.raises(UsageError, match="has intermediate_size"):
            check_fields({"intermediate_size": value}, by_layer=by_layer)
