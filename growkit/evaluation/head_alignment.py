"""Calibration of ``--merge aligned``: how alike the key/value heads of a group are on a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from growkit.checkpoint import Checkpoint
from growkit.core.progress import Progress
from growkit.samples import sample_text
from growkit.surgery.effect import ModelShape
from growkit.variants.gqa.aligned import rotatable_pairs
from growkit.variants.gqa.alignment import Alignment, aligned_angles, aligned_bases
from growkit.verification.loading import load_model, load_tokenizer
from growkit.verification.windows import encoder, token_windows
from growkit.verification.written_folder import open_folder

TOKENS, WINDOW = 4096, 256


class _Moments:
    """Sums over tokens of the products of two heads of a group, of one layer."""

    def __init__(self, groups: int, group: int, dim: int) -> None:
        self.groups, self.group, self.dim = groups, group, dim
        self.keys = torch.zeros(groups, dim // 2, group, group, dtype=torch.complex128)
        self.values = torch.zeros(groups, group * dim, group * dim, dtype=torch.float64)

    def add_keys(self, keys: torch.Tensor) -> None:
        """Take in keys [..., kv heads x head_dim] before their norm and rotary embedding."""
        split = keys.double().reshape(-1, self.groups, self.group, 2, self.dim // 2)
        pair = torch.complex(split[..., 0, :], split[..., 1, :])
        self.keys += torch.einsum("tgap,tgbp->gpab", pair.conj(), pair)

    def add_values(self, values: torch.Tensor) -> None:
        """Take in values [..., kv heads x head_dim]."""
        heads = values.double().reshape(-1, self.groups, self.group * self.dim).transpose(0, 1)
        self.values += heads.transpose(1, 2) @ heads


def _hook(take: Callable[[torch.Tensor], None]) -> Callable[[Any, Any, torch.Tensor], None]:
    return lambda module, given, result: take(result)


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint, shape: ModelShape, heads: int, text: str | None, progress: Progress
) -> Alignment:
    """Align the key/value heads that become one of ``heads``, on at most ``TOKENS`` tokens.

    Keys are compared as projected: a rotation of a pair commutes with the rotary embedding, so
    positions do not matter.

    Args:
        checkpoint: the source; transformers loads it in float32 (float64 sums).
        shape: of the source.
        heads: key/value heads that are left.
        text: default the built-in sample.
        progress: a bar of 100.

    Returns:
        The alignment.

    Raises:
        UsageError, CheckpointError: a text too short, or a folder that transformers cannot load.
    """
    sizes, family = shape.sizes, shape.family
    layers, before, dim = sizes["layer"], sizes["kv_head"], sizes["head_dim"]
    folder = open_folder(checkpoint.path)
    model = load_model(folder, torch.float32)
    encode = encoder(load_tokenizer(folder), sizes["vocab"])
    windows = token_windows(
        text or sample_text(), encode, tokens=TOKENS, window=WINDOW, vocab_size=sizes["vocab"]
    )
    moments = [_Moments(heads, before // heads, dim) for _ in range(layers)]
    for layer, sums in enumerate(moments):
        for role, take in (("k", sums.add_keys), ("v", sums.add_values)):
            tensor = family.tensor(role)
            assert tensor is not None
            name = tensor.name.replace("{layer}", str(layer)).removesuffix(".weight")
            model.get_submodule(name).register_forward_hook(_hook(take))
    for window in windows:
        model(input_ids=window[None], use_cache=False)
        progress.advance(100 / len(windows))
    angles, bases = [], []
    for layer, sums in enumerate(moments):
        found = np.concatenate([aligned_angles(part) for part in sums.keys.numpy()])
        angles.append(np.where(rotatable_pairs(checkpoint, shape, layer), found, 0.0))
        split = sums.values.numpy().reshape(heads, before // heads, dim, before // heads, dim)
        bases.append(np.concatenate([aligned_bases(part) for part in split]))
    return Alignment(np.stack(angles), np.stack(bases), windows.numel())
