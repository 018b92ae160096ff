"""config.json in the words of older releases: read, grown and verified like today's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from growkit.checkpoint.folder import open_checkpoint
from growkit.checkpoint.older_config import current_form
from growkit.growing import grow_checkpoint
from growkit.surgery.request import GrowthRequest
from growkit.verification.comparison import verify_checkpoints

LETTERS = {
    "mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-",
}  # fmt: skip
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
NEMOTRON = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2,
    "chunk_size": 16, "vocab_size": 64, "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
}  # fmt: skip
QWEN = {
    "text_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "tie_word_embeddings": False,
    },
    "vision_config": {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16,
    },
    "image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}  # fmt: skip


def older(model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config as an older release wrote it."""
    config = dict(config)
    if model_type == "bloom":
        config["n_embed"] = config.pop("hidden_size")
    elif model_type == "nemotron_h":
        kinds = config.pop("layers_block_type", None) or config.pop("layer_types")
        config.pop("layer_types", None)
        config["hybrid_override_pattern"] = "".join(LETTERS[kind] for kind in kinds)
    else:
        text = config.pop("text_config")
        config |= {key: value for key, value in text.items() if key != "model_type"}
    return config


def make(model_type: str, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **values)
    wrapper = "text_config" in values
    auto = AutoModelForImageTextToText if wrapper else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    changed = older(model_type, written)
    assert changed != written
    (folder / "config.json").write_text(json.dumps(changed))
    return changed


@pytest.mark.parametrize(
    ("model_type", "values", "request_", "absent"),
    [
        ("bloom", BLOOM, GrowthRequest(layers="x2"), "n_embed"),
        ("nemotron_h", NEMOTRON, GrowthRequest(layers="x2", ffn="x2"), "hybrid_override_pattern"),
        ("qwen2_5_vl", QWEN, GrowthRequest(layers="x2", ffn="x2"), "num_hidden_layers"),
    ],
)
def test_older_forms_grow(
    model_type: str,
    values: dict[str, Any],
    request_: GrowthRequest,
    absent: str,
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    config = make(model_type, values, source)
    assert absent in config
    grow_checkpoint(source, tmp_path / "grown", request_, verify=False)
    assert absent not in json.loads((tmp_path / "grown" / "config.json").read_text())
    report = verify_checkpoints(source, tmp_path / "grown")
    assert report.passed, report.cause


def test_what_an_older_form_says_is_not_lost() -> None:
    words = {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "x": 1}
    old = {"model_type": "nemotron_h", "hybrid_override_pattern": "M*-E", "x": 1}
    assert current_form(old) == {"model_type": "nemotron_h", **words}
    assert current_form({**old, "hybrid_override_pattern": "M?"})["hybrid_override_pattern"] == "M?"
    flat = {"model_type": "qwen2_vl", "vision_config": {}, "hidden_size": 8, "image_token_id": 1}
    text = {"model_type": "qwen2_vl_text", "hidden_size": 8}
    assert current_form(flat) == {
        "model_type": "qwen2_vl", "vision_config": {}, "image_token_id": 1, "text_config": text,
    }  # fmt: skip
    llama = {"model_type": "llama", "n_embed": 3}
    assert current_form(llama) is llama


def test_the_bytes_on_disk_stay_what_they_are(tmp_path: Path) -> None:
    make("bloom", BLOOM, tmp_path / "source")
    checkpoint = open_checkpoint(tmp_path / "source")
    assert checkpoint.config["hidden_size"] == 32
    assert json.loads(checkpoint.config_bytes)["n_embed"] == 32
