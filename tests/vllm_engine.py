"""Serve a folder with vLLM and with transformers; the process can see growkit only where asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from without_growkit import FORBID, run_isolated

ENGINE = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
NEW = 16

def main():
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams
    reference, folder, implementation, trust, prompts = sys.argv[1:]
    prompts = json.loads(prompts)
    model = AutoModelForCausalLM.from_pretrained(reference, trust_remote_code=True).eval()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = [model.generate(torch.tensor([p]), **options)[0, len(p):].tolist() for p in prompts]
    del model
    try:
        engine = LLM(folder, model_impl=implementation, dtype="float32", skip_tokenizer_init=True,
                     trust_remote_code=bool(trust), enforce_eager=True, max_model_len=64)
    except Exception as error:
        print("REPORT" + json.dumps({"refused": str(error)}))
        return
    sampling = SamplingParams(temperature=0, max_tokens=NEW, detokenize=False, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    classes = engine.apply_model(lambda model: type(model).__name__)
    print("REPORT" + json.dumps({"expected": expected, "found": found, "class": classes[0]}))

if __name__ == "__main__":
    main()
"""
# One batch of several lengths.
PROMPTS = [[5, 9, 3, 8, 7, 11], [4, 2, 6], [33]]


def served(
    reference: Path,
    folder: Path,
    cache: Path,
    implementation: str = "transformers",
    *,
    trust: bool = True,
    prompts: list[list[int]] = PROMPTS,
    plugin: bool = False,
) -> dict[str, Any]:
    """16 greedy tokens a prompt.

    Args:
        reference: folder whose tokens transformers gives.
        folder: folder that vLLM serves.
        cache: where transformers copies the code of folders to.
        implementation: "vllm" (a class of its own) or "transformers".
        trust: vLLM may run code of the folder.
        prompts: token ids.
        plugin: growkit is to be seen, and its plugin with it.

    Returns:
        ``expected`` and ``found`` tokens and the ``class`` in vLLM, or ``refused``: the error.
    """
    arguments = (reference, folder, implementation, "trusted" if trust else "", json.dumps(prompts))
    script = ENGINE if plugin else FORBID + ENGINE
    stdout = run_isolated(script, *arguments, cache=cache)
    report: dict[str, Any] = json.loads(stdout.split("REPORT", 1)[1].splitlines()[0])
    return report
