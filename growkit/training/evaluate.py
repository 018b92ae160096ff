"""Held-out loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from typing import Any

import torch

from growkit.training.packing import PackedDataset


@torch.no_grad()
def evaluate(
    model: Any,
    dataset: PackedDataset,
    *,
    batch_size: int,
    bytes_per_token: float | None = None,
) -> dict[str, float]:
    """Mean negative log-likelihood over every predicted token of a packed dataset.

    The first token of a sequence is not predicted. Sums are kept in float64 and weighted by token,
    so a shorter last batch does not distort the mean; no random numbers are drawn.

    Returns:
        ``eval_loss`` (nats a token), ``perplexity`` (its exponential, at most e^700) and,
        when ``bytes_per_token`` of the held-out text is known, ``bits_per_byte``.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for start in range(0, len(dataset), batch_size):
            items = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            ids = torch.stack([item["input_ids"] for item in items]).to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
            )
            total += losses.double().sum().item()
            count += losses.numel()
    finally:
        model.train(training)
    loss = total / count
    result = {"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if bytes_per_token:
        result["bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return result
