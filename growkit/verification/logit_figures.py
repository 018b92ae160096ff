"""Figures of two logit tensors, summed batch by batch in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Logits a step, whose float64 copies stay in a processor's cache: a third of the time.
ELEMENTS = 1 << 18


@dataclass
class LogitFigures:
    """Running comparison of logits A and B on the same tokens."""

    positions: int = 0
    elements: int = 0
    predictions: int = 0
    square_sum: float = 0.0
    logit_max: float = 0.0
    max_difference: float = 0.0
    difference_sum: float = 0.0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    agreements: int = 0
    loss_a: float = 0.0
    loss_b: float = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor | None) -> None:
        """Add logits ``[batch, length, vocab]`` of token ids ``[batch, length]``.

        ``ids``: None where the next token is not predicted (encoders, ``[..., width]``): then
        neither KL nor loss is counted.
        """
        vocab = a.shape[-1]
        if ids is None:
            a, b = a.reshape(-1, vocab), b.reshape(-1, vocab)
            for left, right in zip(_steps(a), _steps(b), strict=True):
                self._add_differences(left.double(), right.double())
            return
        targets = torch.full_like(ids, -1)
        targets[:, :-1] = ids[:, 1:]
        a, b, targets = a.reshape(-1, vocab), b.reshape(-1, vocab), targets.reshape(-1)
        done = 0
        for left, right in zip(_steps(a), _steps(b), strict=True):
            known = targets[done : done + len(left)]
            self._add_rows(left.double(), right.double(), known)
            done += len(left)

    def _add_differences(self, a: torch.Tensor, b: torch.Tensor) -> None:
        difference = (a - b).abs()
        self.positions += len(a)
        self.elements += a.numel()
        self.square_sum += float(a.square().sum())
        self.logit_max = max(self.logit_max, float(a.abs().max()))
        self.max_difference = max(self.max_difference, float(difference.max()))
        self.difference_sum += float(difference.sum())
        self.agreements += int((a.argmax(-1) == b.argmax(-1)).sum())

    def _add_rows(self, a: torch.Tensor, b: torch.Tensor, targets: torch.Tensor) -> None:
        self._add_differences(a, b)
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        kl = (log_a.exp() * (log_a - log_b)).sum(-1).clamp(min=0.0)
        self.kl_sum += float(kl.sum())
        self.kl_max = max(self.kl_max, float(kl.max()))
        known = targets >= 0
        chosen = targets[known, None]
        self.predictions += int(known.sum())
        self.loss_a -= float(log_a[known].gather(-1, chosen).sum())
        self.loss_b -= float(log_b[known].gather(-1, chosen).sum())

    @property
    def logit_rms(self) -> float:
        return math.sqrt(self.square_sum / self.elements)

    @property
    def mean_difference(self) -> float:
        return self.difference_sum / self.elements

    @property
    def kl_mean(self) -> float:
        return self.kl_sum / self.positions

    @property
    def top1_agreement(self) -> float:
        return self.agreements / self.positions

    @property
    def perplexity_a(self) -> float:
        return math.exp(min(700.0, self.loss_a / self.predictions)) if self.predictions else 0.0

    @property
    def perplexity_b(self) -> float:
        return math.exp(min(700.0, self.loss_b / self.predictions)) if self.predictions else 0.0


def _steps(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``[positions, vocab]`` in blocks of a few positions."""
    return logits.split(max(1, ELEMENTS // logits.shape[-1]))
