"""Load a folder once, for whatever is measured on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growkit.core.errors import CheckpointError, UsageError
from growkit.verification.loading import load_model, load_tokenizer
from growkit.verification.model_inputs import is_encoder_decoder
from growkit.verification.written_folder import dtype_name, open_folder

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode, its tokenizer and where it runs."""

    path: Path
    model: nn.Module
    tokenizer: Any
    device: torch.device
    dtype: str


def load(
    path: Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a checkpoint folder through transformers.

    Args:
        device: ``auto`` is the first GPU, or the CPU; else as torch names it.
        dtype: ``auto`` is float32 on the CPU and the stored dtype on a GPU.

    Raises:
        UsageError: unknown dtype, or a device that is not there.
        CheckpointError: transformers cannot load the folder, or it has no tokenizer.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(
            f"--dtype {dtype!r} is not known.", f"Valid values: auto, {', '.join(DTYPES)}."
        )
    place = _device(device)
    folder = open_folder(path)
    stored = torch.float32 if place.type == "cpu" else folder.storage_dtype
    chosen = DTYPES.get(dtype, stored)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise CheckpointError(
            f"{str(path)!r} has no tokenizer that loads.",
            "Copy the tokenizer's files into the folder.",
        )
    model = load_model(folder, chosen, trust_remote_code=trust_remote_code)
    return LoadedModel(path, model.to(place), tokenizer, place, dtype_name(chosen))


def check_causal(model: Any) -> None:
    """Raises UsageError for an encoder-decoder."""
    if is_encoder_decoder(model):
        raise UsageError(
            f"{model.config.model_type!r} is an encoder-decoder, and only causal language models "
            "are measured.",
            "Give a decoder-only checkpoint.",
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name!r} cannot be used here.", "Give auto, cpu or cuda:0."
        ) from error
    return device
