"""Noise in context: where the attention goes while the model is about to answer.

The position that predicts the first token of the answer attends to the whole prompt. How its mass
divides over the answer, the rest of its needle and everything that does not matter is the measure
of arXiv:2410.05258, section 3.4 ("attention allocated to the answer span and noise context").

Shares are of **absolute** weights: |w| on a part over the sum of |w|, so that they are
between 0 and 1 and sum to 1 for a difference map too, whose weights may be negative (``effective``
= signal - lambda * noise, see :class:`growkit.evaluation.attention_maps.LayerMaps`). The signed
figures divide the sum of w by the same sum of |w|: noise whose signs cancel counts as none there.
In a softmax map both are the plain shares of its mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from growkit.core.progress import Progress, SilentProgress
from growkit.evaluation.attention_maps import LayerMaps, observe
from growkit.evaluation.model import LoadedModel
from growkit.evaluation.needles import Haystack, Haystacks, prompt

PARTS = ("answer", "needle", "noise", "first_token", "question")


@dataclass(frozen=True)
class Shares:
    """Shares of the attention of one position; they sum to 1.

    Attributes:
        answer: tokens of the answer in its needle.
        needle: the other tokens of that needle.
        noise: the text and the needles that are not asked for.
        first_token: the prompt's first token, where many models put attention that they do not
            need (attention sink, arXiv:2309.17453).
        question: the question at the end.
    """

    answer: float
    needle: float
    noise: float
    first_token: float
    question: float


@dataclass(frozen=True)
class MapShares:
    """Figures of one kind of map.

    Attributes:
        shares: means over layers, heads and prompts.
        signed_answer, signed_noise: the same of w itself; see the head of this module.
        answer_standard_error: of ``shares.answer`` over prompts; None for a single one.
        answer_by_layer: mean over heads, one number per layer.
        answer_of_best_head: largest mean over prompts that a head of the layer has.
        noise_by_layer: mean over heads, one number per layer.
    """

    shares: Shares
    signed_answer: float
    signed_noise: float
    answer_standard_error: float | None
    answer_by_layer: tuple[float, ...]
    answer_of_best_head: tuple[float, ...]
    noise_by_layer: tuple[float, ...]


@dataclass(frozen=True)
class ContextNoise:
    """Figures of one form and depth.

    Attributes:
        form: of the needles.
        length: tokens of the context with question and answer.
        depth: of the needle that is asked for; None for all depths together.
        prompts: how many were measured.
        uniform: what a map that spreads its mass evenly would have: the level to compare with.
        maps: ``effective``, and for differential attention ``signal`` and ``noise`` heads.
    """

    form: str
    length: int
    depth: float | None
    prompts: int
    uniform: Shares
    maps: dict[str, MapShares]


def measure_context_noise(
    loaded: LoadedModel,
    haystacks: Haystacks,
    *,
    prompts: int,
    progress: Progress | None = None,
) -> list[ContextNoise]:
    """Measure ``prompts`` prompts at each depth, and all together (last).

    Args:
        haystacks: for at least as many questions at each depth.
        progress: advanced by 1 a prompt.

    Raises:
        UsageError, CheckpointError: the model shows no maps; see
            :func:`growkit.evaluation.attention_maps.observe`.
    """
    bar = progress or SilentProgress()
    found: dict[float, list[_Prompt]] = {depth: [] for depth in haystacks.depths}
    for haystack in haystacks.items:
        for query, depth in enumerate(haystack.depths):
            if len(found[depth]) < prompts:
                found[depth].append(_measure(loaded, haystack, query))
                bar.advance(1)
    every = [item for items in found.values() for item in items]
    return [_summary(haystacks, depth, items) for depth, items in [*found.items(), (None, every)]]


def part_masks(haystack: Haystack, query: int) -> Tensor:
    """Which positions of a prompt belong to each of :data:`PARTS`: bool [parts, n]."""
    ids, needle = prompt(haystack, query), haystack.needles[query]
    place, n = haystack.places[query], len(ids)
    masks = torch.zeros(len(PARTS), n, dtype=torch.bool)
    masks[PARTS.index("question"), len(haystack.context) :] = True
    masks[PARTS.index("first_token"), 0] = True
    masks[PARTS.index("answer"), place + needle.start : place + needle.end] = True
    rest = masks[PARTS.index("needle")]
    rest[place : place + len(needle.tokens)] = True
    rest &= ~masks[PARTS.index("answer")]
    masks[PARTS.index("noise")] = ~masks.any(0)
    return masks


class _Prompt:
    """Shares of one prompt: uniform [parts], and per kind of map [layers, 2, parts, heads]."""

    def __init__(self, uniform: Tensor) -> None:
        self.uniform = uniform
        self.layers: dict[str, list[Tensor]] = {}

    def take(self, name: str, weights: Tensor, masks: Tensor) -> None:
        """Last rows ``weights`` [heads, n]: absolute shares, then signed ones."""
        total = weights.abs().sum(-1).clamp(min=torch.finfo(weights.dtype).tiny)
        both = torch.stack([weights.abs(), weights]) / total[:, None]
        self.layers.setdefault(name, []).append((both @ masks.T).transpose(1, 2).cpu())


def _measure(loaded: LoadedModel, haystack: Haystack, query: int) -> _Prompt:
    masks = part_masks(haystack, query).double().to(loaded.device)
    result = _Prompt(masks.mean(-1).cpu())

    def take(layer: int, attention: LayerMaps) -> None:
        for name, maps in attention.last_rows().groups().items():
            result.take(name, maps[0, :, -1], masks)

    observe(loaded.model, take, input_ids=prompt(haystack, query)[None].to(loaded.device))
    return result


def _summary(haystacks: Haystacks, depth: float | None, items: Sequence[_Prompt]) -> ContextNoise:
    maps = {}
    for name in items[0].layers:
        # Layers may differ in heads: the mean over heads comes first, then the one over layers.
        heads = [
            torch.stack([item.layers[name][layer] for item in items])  # [prompts, 2, parts, heads]
            for layer in range(len(items[0].layers[name]))
        ]
        layers = torch.stack([layer.mean(-1) for layer in heads])  # [layers, prompts, 2, parts]
        by_prompt = layers.mean(0)
        answer, noise = PARTS.index("answer"), PARTS.index("noise")
        absolute, signed = by_prompt.mean(0)
        count = len(items)
        spread = by_prompt[:, 0, answer].std().item() / count**0.5 if count > 1 else None
        maps[name] = MapShares(
            Shares(*absolute.tolist()),
            signed[answer].item(),
            signed[noise].item(),
            spread,
            tuple(layers[:, :, 0, answer].mean(1).tolist()),
            tuple(layer[:, 0, answer].mean(0).max().item() for layer in heads),
            tuple(layers[:, :, 0, noise].mean(1).tolist()),
        )
    uniform = torch.stack([item.uniform for item in items]).mean(0)
    return ContextNoise(
        haystacks.form, haystacks.length, depth, len(items), Shares(*uniform.tolist()), maps
    )
