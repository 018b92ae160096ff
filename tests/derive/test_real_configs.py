"""config.json of published models: a table fits each, written or derived, and counts its elements.

``real_configs.json`` holds the configs as they are published, and the elements that the table
declares for them without seeing the files: of the part that grows (the language model of a
multimodal one), and not of tensors that are as large as they are stored (ELECTRA's embedding).
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from growkit.checkpoint.older_config import current_form
from growkit.families import family_of
from growkit.families.derived.family import derived_family
from growkit.families.derived.fit import misfit
from growkit.families.derived.store import tables_of
from growkit.growing import grow_checkpoint
from growkit.surgery.request import GrowthRequest
from growkit.verification.comparison import verify_checkpoints

MODELS = json.loads(Path(__file__).with_name("real_configs.json").read_text())
# Billions, as the model cards say; of those that state the part that grows.
PUBLISHED = {
    "openai/gpt-oss-20b": 20.9,
    "deepseek-ai/DeepSeek-V3": 671,
    "zai-org/GLM-4.5-Air": 106.9,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 79.7,
    "google-bert/bert-base-uncased": 0.11,
    "answerdotai/ModernBERT-base": 0.149,
    "microsoft/phi-2": 2.78,
    "ai21labs/Jamba-v0.1": 51.6,
    "CohereLabs/c4ai-command-r-v01": 35,
    "allenai/OLMoE-1B-7B-0924": 6.92,
    "bigcode/starcoder": 15.5,
    "bigscience/bloom-560m": 0.559,
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": 8.89,
    "microsoft/Phi-3.5-MoE-instruct": 41.9,
    "databricks/dbrx-base": 131.6,
    "tiiuae/falcon-7b": 6.92,
    "google/mt5-small": 0.3,
    "microsoft/phi-4": 14.66,
    "HuggingFaceTB/SmolLM3-3B": 3.08,
    "Qwen/Qwen1.5-MoE-A2.7B": 14.3,
    "microsoft/deberta-v3-base": 0.184,
    "Helsinki-NLP/opus-mt-en-de": 0.074,
    "tiiuae/Falcon-H1-0.5B-Base": 0.521,
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_table_fits_and_counts(name: str) -> None:
    config = current_form(MODELS[name]["config"])
    family = family_of(config)
    found = sum(prod(shape) for _, shape in family.declared(family.sizes_of(config)))
    assert found == MODELS[name]["parameters"]
    if name in PUBLISHED:
        assert found / 1e9 == pytest.approx(PUBLISHED[name], rel=0.006)


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("openai/gpt-oss-20b", {"attention_bias": False}, "attention_bias"),
        ("microsoft/phi-2", {"qk_layernorm": True}, "qk_layernorm"),
        ("swiss-ai/Apertus-8B-2509", {"hidden_act": "silu"}, "hidden_act"),
        ("bigcode/starcoder2-3b", {"hidden_act": "sigmoid"}, "hidden_act"),  # f(0) is not 0
        ("ibm-granite/granite-4.0-h-tiny", {"num_local_experts": 0}, "num_local_experts"),
        ("google/electra-small-discriminator", {"embedding_size": 256}, "embedding_size"),
    ],
)
def test_what_a_table_was_not_derived_for_is_refused(
    name: str, changes: dict[str, Any], field: str
) -> None:
    config = MODELS[name]["config"] | changes
    assert derived_family(config) is None
    assert field in [misfit(table, config) for table in tables_of(config["model_type"])]


@pytest.mark.parametrize("new_units", ["copy", "zero"])
def test_another_activation_grows_by_the_same_table(new_units: str, tmp_path: Path) -> None:
    """The table was derived with gelu_pytorch_tanh."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "starcoder2", hidden_act="relu2", hidden_size=32, intermediate_size=48, vocab_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    request = GrowthRequest(ffn="x2", layers="x2", new_units=new_units)
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", request, verify=False)
    report = verify_checkpoints(tmp_path / "source", tmp_path / "grown")
    assert report.passed, report.cause


@pytest.mark.parametrize("stated", [True, False])
def test_mt5_is_a_t5_that_scales_nothing(stated: bool, tmp_path: Path) -> None:
    """Whatever its config says of tied embeddings: published ones say false, the class true."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mt5", d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, vocab_size=64
    )
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": stated}))
    request = GrowthRequest(hidden="x2", layers="x2", heads="x2")
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", request, verify=False)
    report = verify_checkpoints(tmp_path / "source", tmp_path / "grown")
    assert report.passed, report.cause
