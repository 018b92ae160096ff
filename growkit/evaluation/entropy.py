"""Attention entropy: how widely each head group spreads its attention, layer by layer.

Nats, a mean over positions, heads and windows; and the same divided by the largest entropy that the
position can have, log of the number of keys that it sees (0: one key, 1: even). Positions that see
one key are left out: they have no choice. A difference map is read as |w| over the sum of |w|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from growkit.core.progress import Progress, SilentProgress
from growkit.evaluation.attention_maps import LayerMaps, observe, row_entropy
from growkit.evaluation.model import LoadedModel


@dataclass(frozen=True)
class Entropy:
    """Entropy of one head group of one layer.

    Attributes:
        nats: mean entropy.
        normalised: mean of entropy / log(keys that are seen).
    """

    nats: float
    normalised: float


@dataclass(frozen=True)
class AttentionEntropy:
    """Entropy of all layers.

    Attributes:
        tokens: positions of the windows, each measured in every head.
        window: tokens of a window: entropy in nats grows with it.
        mean: kind of map (``effective``, and of differential attention ``signal`` and ``noise``) ->
            mean over layers.
        layers: the same of each layer.
    """

    tokens: int
    window: int
    mean: dict[str, Entropy]
    layers: tuple[dict[str, Entropy], ...]


def measure_entropy(
    loaded: LoadedModel, windows: Tensor, *, progress: Progress | None = None
) -> AttentionEntropy:
    """Measure token ids ``windows`` [windows, n]; ``progress`` is advanced by 1 a window.

    Raises:
        UsageError, CheckpointError: the model shows no maps; see
            :func:`growkit.evaluation.attention_maps.observe`.
    """
    bar = progress or SilentProgress()
    found: dict[tuple[int, str], list[Tensor]] = {}

    def take(layer: int, attention: LayerMaps) -> None:
        for name, maps in attention.groups().items():
            both = _entropy(maps, attention.visible)
            found.setdefault((layer, name), []).append(both.cpu())

    for window in windows.to(loaded.device):
        observe(loaded.model, take, input_ids=window[None])
        bar.advance(1)
    layers: list[dict[str, Entropy]] = [{} for _ in range(1 + max(layer for layer, _ in found))]
    for (layer, name), measured in found.items():
        layers[layer][name] = Entropy(*torch.stack(measured).mean(0).tolist())
    names = list(dict.fromkeys(name for _, name in found))
    mean = {name: _mean([layer[name] for layer in layers if name in layer]) for name in names}
    return AttentionEntropy(windows.numel(), windows.shape[1], mean, tuple(layers))


def _entropy(maps: Tensor, visible: Tensor) -> Tensor:
    """Mean entropy and mean normalised entropy of maps [b, heads, n, n]: [2]."""
    chosen = (visible > 1).expand(len(maps), -1)
    entropy = row_entropy(maps).transpose(1, 2)[chosen]  # [rows, heads]
    largest = visible.expand(len(maps), -1)[chosen].double().log()
    return torch.stack([entropy.mean(), (entropy / largest[:, None]).mean()])


def _mean(values: list[Entropy]) -> Entropy:
    count = len(values)
    return Entropy(
        sum(value.nats for value in values) / count,
        sum(value.normalised for value in values) / count,
    )
