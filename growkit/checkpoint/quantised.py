"""Quantised checkpoints are named and refused: their numbers cannot be copied, split or summed."""

from __future__ import annotations

import re
from collections.abc import Iterator

from growkit.checkpoint.folder import Checkpoint
from growkit.core.errors import UsageError

# quant_method of config.json, where people know it by another name.
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "aqlm": "AQLM",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FBGEMM FP8",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "gguf": "GGUF",
    "bitsandbytes": "bitsandbytes",
}
# What the packages call the parts of a quantised weight -> the method, where config.json is silent.
_PARTS = (
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.(absmax|nested_absmax|quant_map|quant_state(\.\w+)*)$", "bitsandbytes 4-bit"),
    (r"\.(SCB|weight_format)$", "bitsandbytes 8-bit"),
    (r"\.(weight_packed|weight_zero_point|weight_g_idx)$", "compressed-tensors"),
    (r"\.(weight_scale_inv|weight_scale|input_scale|activation_scale)$", "FP8"),
    (r"_(blocks|scales)$", "MXFP4"),
    (r"\.(scales|zeros|biases)$", "block-quantised"),
)
_ANY_PART = re.compile("|".join(pattern for pattern, _ in _PARTS))
_INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32"}


# Methods whose layers are copied with their bytes and scales -> what ends the names of such parts,
# and the config that undoes them.
COPIED = {"fp8": ("_scale_inv", "FineGrainedFP8Config"), "mxfp4": ("_blocks", "Mxfp4Config")}


def copied_method(checkpoint: Checkpoint) -> str:
    """The quantisation of a checkpoint whose layers can be copied as they are stored, or empty:
    MXFP4, and FP8 with a scale for each block, stated and stored."""
    stated = checkpoint.config.get("quantization_config")
    method = str(stated.get("quant_method")).lower() if isinstance(stated, dict) else ""
    ending = COPIED.get(method, ("",))[0]
    stored = bool(ending) and any(name.endswith(ending) for name in checkpoint.tensors)
    return method if stored else ""


def check_copies_only(checkpoint: Checkpoint, asked: str) -> None:
    """Raise UsageError, with the command that undoes the quantisation, if there is one.

    Args:
        asked: what would change single weights.
    """
    if method := copied_method(checkpoint):
        config = COPIED[method][1]
        source = str(checkpoint.path)
        raise UsageError(
            f"{source!r} is quantised ({_NAMES[method]}), and {asked} changes single weights: only "
            "whole layers are copied as they are stored (--layers).",
            'Write it in bfloat16 first: python -c "from transformers import '
            f"AutoModelForCausalLM as M, {config} as C; M.from_pretrained({source!r}, "
            "dtype='bfloat16', quantization_config=C(dequantize=True))"
            f'.save_pretrained({source + "-bf16"!r})"',
        )


def check_unquantised(checkpoint: Checkpoint) -> None:
    """Raise UsageError naming the quantisation of a checkpoint, stated or recognised, unless its
    layers can be copied as they are stored.

    Recognised is what tensors are called (``qweight``, ``weight_scale`` ...) and stored as (eight
    bits or fewer, or whole numbers where weights are expected).
    """
    if copied_method(checkpoint):
        return
    for found in (*_stated(checkpoint), *_recognised(checkpoint)):
        raise UsageError(
            f"{str(checkpoint.path)!r} is quantised: {found}; growkit grows weights in float32, "
            "bfloat16 or float16.",
            "Grow the unquantised checkpoint that it was made from, and quantise the result.",
        )


def _stated(checkpoint: Checkpoint) -> Iterator[str]:
    for field in ("quantization_config", "compression_config", "quantization"):
        stated = checkpoint.config.get(field)
        if not isinstance(stated, dict) or not stated:
            continue
        method = stated.get("quant_method") or stated.get("quantization_method")
        name = _NAMES.get(str(method).lower(), str(method)) if method else "method not stated"
        eight = stated.get("load_in_8bit")
        if name == "bitsandbytes" and (eight or stated.get("load_in_4bit")):
            name += " 8-bit" if eight else " 4-bit"
        elif isinstance(stated.get("bits"), int):
            name += f", {stated['bits']} bits"
        yield f"{name} ({field} of config.json)"


def _recognised(checkpoint: Checkpoint) -> Iterator[str]:
    for name in checkpoint.tensors:
        if _ANY_PART.search(name):
            yield next(f"{m} (tensor {name!r})" for p, m in _PARTS if re.search(p, name))
    for name, info in checkpoint.tensors.items():
        if info.dtype.startswith(("F8_", "F6_", "F4")):
            method = "FP8" if info.dtype.startswith("F8_") else "MXFP4"
            yield f"{method} (tensor {name!r} is stored as {info.dtype})"
        elif name.endswith("weight") and info.dtype in _INTEGERS:
            yield f"whole numbers (tensor {name!r} is stored as {info.dtype})"
