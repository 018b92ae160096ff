"""vLLM serves our folders, or says at once why not: the greedy tokens of transformers.

Runs where vLLM is installed (vllm-cpu 0.32 was tried); growkit is hidden from it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from folded_pairs import PAIRS, SIZES, write_pair
from gda_cases import gda_config, scatter_weights
from variant_cases import model_of
from without_growkit import run_without_growkit

from growkit.modeling import GdaForCausalLM

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
ENGINE = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
PROMPTS = [[5, 9, 3, 8, 7, 11], [4, 2, 6], [33]]  # one batch of several lengths
NEW = 16

def main():
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams
    reference, folder, implementation, trust = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(reference, trust_remote_code=True).eval()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(torch.tensor([p]), **options)[0, len(p):].tolist() for p in PROMPTS]
    try:
        engine = LLM(folder, model_impl=implementation, dtype="float32", skip_tokenizer_init=True,
                     trust_remote_code=bool(trust), enforce_eager=True,
                     max_model_len=64)
    except Exception as error:
        print("REPORT" + json.dumps({"refused": str(error)}))
        return
    sampling = SamplingParams(temperature=0, max_tokens=NEW, detokenize=False, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    classes = engine.apply_model(lambda model: type(model).__name__)
    print("REPORT" + json.dumps({"expected": expected, "found": found, "class": classes[0]}))

if __name__ == "__main__":
    main()
"""


def served(
    reference: Path, folder: Path, implementation: str, cache: Path, *, trust: bool = True
) -> dict[str, Any]:
    arguments = (reference, folder, implementation, "trusted" if trust else "")
    stdout = run_without_growkit(ENGINE, *arguments, cache=cache)
    report: dict[str, Any] = json.loads(stdout.split("REPORT", 1)[1].splitlines()[0])
    return report


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
        wide = {"simulated_head_dim": 64} if case == "sas" else {}
        model = model_of(case, **SIZES, **wide)
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
    check(served(folder, folder, "transformers", tmp_path))


@pytest.mark.parametrize("case", ["gda-own-norm", "diff_v1-plain", "shared_diff", "sas"])
def test_vllm_refuses_what_it_cannot_compute(case, tmp_path):
    folder = write_model(case, tmp_path / "folder")
    report = served(folder, folder, "transformers", tmp_path)
    assert "vllm cannot serve this model" in report["refused"]


@pytest.mark.parametrize("name", PAIRS)
def test_vllm_serves_a_folded_folder_without_code_of_ours(name, tmp_path):
    """By vLLM's own class, with the tokens of the unfolded variant under transformers.

    vLLM's Qwen2 ignores head_dim, as the export warns: transformers' class in its place.
    """
    variant, folded = write_pair(tmp_path, name)
    own_class = PAIRS[name][3] != "qwen2"
    report = served(variant, folded, "vllm" if own_class else "transformers", tmp_path, trust=False)
    check(report)
    kind = PAIRS[name][3] if own_class else "transformers"
    assert report["class"].lower() == f"{kind}forcausallm"
