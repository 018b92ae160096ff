"""Activation outliers: the largest attention logits and hidden states against their median.

The table of arXiv:2410.05258, section 3.7: top-1, 2, 3, 10, 100 and median of absolute values.
Attention logits are what the softmax gets (scaled, capped where the model caps them, before the
mask is added, of visible keys alone); hidden states are the outputs of every layer. Over all
layers, heads and tokens; the larger the sample, the larger its largest values: compare models on
the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from growkit.core.errors import CheckpointError
from growkit.core.progress import Progress, SilentProgress
from growkit.evaluation.attention_maps import eager, visible_keys
from growkit.evaluation.model import LoadedModel
from growkit.verification.layers import layer_stacks, recorded_residuals

RANKS = (1, 2, 3, 10, 100)
# Bits of a float32 that a bin of the median's histogram leaves out: 12 of its 23 of mantissa.
DROPPED_BITS = 12


@dataclass(frozen=True)
class Outliers:
    """Absolute values, largest first; None where there are fewer values than that.

    Attributes:
        median: to within 0.025 % (of a histogram with as fine bins).
        values: how many there were.
    """

    top_1: float | None
    top_2: float | None
    top_3: float | None
    top_10: float | None
    top_100: float | None
    median: float | None
    values: int


@dataclass(frozen=True)
class ActivationOutliers:
    """Outliers of one model.

    Attributes:
        tokens: that were run.
        attention_logits: None where the model's class does not show them.
        hidden_states: outputs of all layers.
        largest_hidden_state: absolute, of each layer.
        hidden_kurtosis: of each layer's output, all tokens and features together: the fourth
            central moment over the squared variance; 3 for a normal distribution. NaN-free: a
            constant output gives None.
    """

    tokens: int
    attention_logits: Outliers | None
    hidden_states: Outliers
    largest_hidden_state: tuple[float, ...]
    hidden_kurtosis: tuple[float | None, ...]


class LargestValues:
    """Running top-100 and median of absolute values, in memory that does not grow."""

    def __init__(self) -> None:
        self.top = torch.empty(0)
        self.bins = torch.zeros(1 << (31 - DROPPED_BITS), dtype=torch.long)
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Take in a tensor of any shape."""
        values = values.detach().float().abs().flatten()
        self.count += len(values)
        largest = torch.cat([values.topk(min(RANKS[-1], len(values))).values.cpu(), self.top])
        self.top = largest.sort(descending=True).values[: RANKS[-1]]
        # The bits of a positive float, read as an integer, are in the order of the floats.
        codes = values.view(torch.int32) >> DROPPED_BITS
        self.bins += torch.bincount(codes, minlength=len(self.bins)).cpu()

    def result(self) -> Outliers:
        """What was seen so far."""
        tops = {
            f"top_{rank}": self.top[rank - 1].item() if rank <= self.count else None
            for rank in RANKS
        }
        return Outliers(**tops, median=self._median(), values=self.count)

    def _median(self) -> float | None:
        if not self.count:
            return None
        code = int(torch.searchsorted(self.bins.cumsum(0), (self.count + 1) // 2))
        middle = (code << DROPPED_BITS) + ((1 << DROPPED_BITS) // 2 if code else 0)
        return torch.tensor(middle, dtype=torch.int32).view(torch.float32).item()


@torch.no_grad()
def measure_outliers(
    loaded: LoadedModel, windows: Tensor, *, progress: Progress | None = None
) -> ActivationOutliers:
    """Measure token ids ``windows`` [windows, n]; ``progress`` is advanced by 1 a window.

    Raises:
        CheckpointError: the model has no list of layers.
    """
    bar = progress or SilentProgress()
    model: Any = loaded.model
    layers = layer_stacks(model).get("")
    if layers is None:
        raise CheckpointError(
            f"{type(model).__name__} has no layers to read hidden states from.",
            "Leave out the suite for this checkpoint.",
        )
    logits, hidden = LargestValues(), LargestValues()
    sums = torch.zeros(len(layers), 5, dtype=torch.float64)  # of x^0 ... x^4
    largest = [0.0] * len(layers)
    with eager(model), attention_logits(logits.add):
        for window in windows.to(loaded.device):
            with recorded_residuals(layers) as streams:
                model(input_ids=window[None], use_cache=False)
            for layer, stream in enumerate(streams[1:]):
                hidden.add(stream)
                x = stream.double()
                sums[layer] += torch.stack([x.pow(power).sum() for power in range(5)]).cpu()
                largest[layer] = max(largest[layer], x.abs().max().item())
            bar.advance(1)
    return ActivationOutliers(
        windows.numel(),
        logits.result() if logits.count else None,
        hidden.result(),
        tuple(largest),
        tuple(_kurtosis(row.tolist()) for row in sums),
    )


@contextmanager
def attention_logits(take: Callable[[Tensor], None]) -> Iterator[None]:
    """``take`` sees the attention logits of visible keys, flat, once an attention layer.

    Read where transformers' models choose their attention function; a class with attention code
    that does not go through it shows nothing.
    """
    choose = ALL_ATTENTION_FUNCTIONS.get_interface
    last: Tensor | None = None

    def chosen(implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = choose(implementation, default)

        def observed(
            module: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            nonlocal last
            # Models whose values are wider than their keys call twice with the same queries.
            if query is not last:
                last = query
                take(_logits(query, key, attention_mask, **kwargs))
            return function(module, query, key, value, attention_mask, *args, **kwargs)

        return observed

    ALL_ATTENTION_FUNCTIONS.get_interface = chosen
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface


def _logits(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    seen = visible_keys(mask, logits.shape[-1], logits.device)
    return logits[seen.expand_as(logits)]


def _kurtosis(sums: list[float]) -> float | None:
    """Of power sums of x^0 ... x^4."""
    count, *powers = sums
    m1, m2, m3, m4 = (power / count for power in powers)
    variance = m2 - m1**2
    if variance <= 1e-12 * m2:
        return None
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return fourth / variance**2
