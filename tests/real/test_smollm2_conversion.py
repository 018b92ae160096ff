"""SmolLM2 -> GDA 3:1 -> signal heads x2 -> proven against SmolLM2 -> an ordinary Mistral."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_engine import served

from growkit.cli.main import main

pytestmark = pytest.mark.real

PROMPT = "The capital of France is"
NEW_TOKENS = 12


def run(*arguments: str | Path) -> None:
    assert main([*map(str, arguments), "--quiet"]) == 0


@pytest.fixture(scope="module")
def chain(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``gda``, ``grown`` and ``plain``; the proofs are run by the tests."""
    folder = tmp_path_factory.mktemp("chain")
    gda, grown, plain = (folder / name for name in ("gda", "grown", "plain"))
    run("convert", smollm2, "--to", "gda", "--ratio", "3", "--out", gda, "--no-verify")
    run("grow", gda, "--signal-heads", "x2", "--out", grown, "--no-verify")
    run("export", grown, "--fold", "--out", plain, "--no-verify")
    return folder


def test_the_grown_variant_is_smollm2(
    smollm2: Path, chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps away from the original, and still the original."""
    config = json.loads((chain / "grown/config.json").read_text())
    assert (config["num_attention_heads"], config["num_noise_heads"]) == (18 + 3, 3)
    short = ["--tokens", "256"]
    assert main(["verify", str(smollm2), str(chain / "grown"), *short, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "passed" and report["generation"]["equals_a"]
    assert report["perplexity_a"] < 100


@torch.inference_mode()
def greedy(folder: Path) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.")
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    tokens: list[int] = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    return tokens


def test_the_folded_folder_is_an_ordinary_model_with_the_same_tokens(
    smollm2: Path, chain: Path
) -> None:
    config = json.loads((chain / "plain/config.json").read_text())
    assert config["model_type"] == "mistral" and config["num_attention_heads"] == 21
    assert "auto_map" not in config and not list((chain / "plain").glob("*.py"))
    assert greedy(chain / "plain") == greedy(smollm2)


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize("name", ["grown", "plain"])
def test_vllm_gives_the_tokens_of_smollm2(
    smollm2: Path, chain: Path, tmp_path: Path, name: str
) -> None:
    """The grown GDA by its own code, the folded one by vLLM's Mistral."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = tokenizer([PROMPT, "Once upon a time"]).input_ids
    kind = "vllm" if name == "plain" else "transformers"
    trust = name == "grown"
    report = served(smollm2, chain / name, tmp_path, kind, trust=trust, prompts=prompts)
    assert report["found"] == report["expected"], report
    assert report["class"] == (
        "MistralForCausalLM" if name == "plain" else "TransformersForCausalLM"
    )
