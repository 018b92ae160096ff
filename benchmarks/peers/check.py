"""Does a grown folder load in transformers 5, and does it compute the same?

    python check.py SOURCE GROWN

prints one JSON line: ``loads`` (no missing, unexpected or mismatched weight), ``max_logit_change``
over 2 sequences of 48 tokens in float32, ``scale`` (the largest logit of the source), or ``error``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

LOAD_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def logits(folder: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits [2, 48, vocabulary] of a folder, and what loading it reported."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    vocabulary = model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits, info


def main(source: str, grown: str) -> dict[str, Any]:
    expected, _ = logits(source)
    try:
        found, info = logits(grown)
    except Exception as error:
        return {"loads": False, "error": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    wrong = {key: len(info[key]) for key in LOAD_KEYS if info.get(key)}
    return {
        "loads": not wrong,
        **wrong,
        "max_logit_change": float((found - expected).abs().max()),
        "scale": float(expected.abs().max()),
    }


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps(main(sys.argv[1], sys.argv[2])))
