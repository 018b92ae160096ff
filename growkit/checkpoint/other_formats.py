"""Folders without safetensors weights: what they hold instead, and the one thing to do."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from growkit.core.errors import CheckpointError, UsageError
from growkit.core.json_files import read_json_object
from growkit.core.names import CONFIG, TOKENIZER

ADAPTER = "adapter_config.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = (TOKENIZER, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_OTHERS = {
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "consolidated.00.pth": "original (consolidated.*.pth)",
    "model.onnx": "ONNX",
}


def other_format(path: Path, files: Collection[str]) -> UsageError | None:
    """Why a folder with these files cannot be read, and the remedy; None for an ordinary one.

    The remedy for pickled weights and adapters is one line to run as it is. It writes a folder
    beside the source, which is left as it was.
    """
    if any(name in files for name in _PICKLED):
        return UsageError(
            f"{str(path)!r} has pytorch_model.bin weights, and only safetensors is read.",
            f"Convert it by: {conversion(path, files)}",
        )
    if ADAPTER in files:
        base = _read(path / ADAPTER).get("base_model_name_or_path")
        return UsageError(
            f"{str(path)!r} holds an adapter"
            + (f" of {base!r}" if base else "")
            + ", not a whole model.",
            "Merge it by: "
            + _line(
                "from peft import AutoPeftModelForCausalLM as M",
                f"M.from_pretrained({str(path)!r}, dtype='auto')"
                f".merge_and_unload().save_pretrained({str(path) + '-merged'!r})",
            ),
        )
    gguf = sorted(name for name in files if name.endswith(".gguf"))
    if gguf:
        return UsageError(
            f"{str(path)!r} has {gguf[0]!r} and no safetensors; GGUF holds weights for inference, "
            "most of them quantised.",
            "Grow the safetensors checkpoint that it was made from, and convert the result.",
        )
    for name, kind in _OTHERS.items():
        if name in files:
            return UsageError(
                f"{str(path)!r} has {kind} weights, and only safetensors is read.",
                "Get the safetensors files of this model, or convert it with transformers first.",
            )
    return None


def conversion(path: Path, files: Collection[str] = (), source: str | None = None) -> str:
    """A shell command that writes ``path`` (or the Hub id ``source``) as safetensors."""
    config = _read(path / CONFIG)
    named = config.get("architectures")
    kind = named[0] if isinstance(named, list) and named and _identifier(named[0]) else None
    if kind is None:
        seq2seq = config.get("is_encoder_decoder")
        kind = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    origin = source or str(path)
    out = (source.split("/")[-1] if source else str(path)) + "-safetensors"
    steps = [
        f"from transformers import {kind} as M, AutoTokenizer as T",
        f"M.from_pretrained({origin!r}, dtype='auto').save_pretrained({out!r})",
    ]
    if source or any(name in files for name in _TOKENIZERS):
        steps.append(f"T.from_pretrained({origin!r}).save_pretrained({out!r})")
    return _line(*steps)


def _line(*steps: str) -> str:
    code = "; ".join(steps)
    # Double quotes read best, but a shell would look for its own signs inside them.
    quoted = shlex.quote(code) if any(sign in code for sign in '"$`\\!') else f'"{code}"'
    return f"python -c {quoted}"


def _identifier(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and name.isascii()


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, non_finite=True)
    except CheckpointError:
        return {}
