"""Perplexity and bits per byte of a text, every token predicted once from a sliding window."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from growkit.core.errors import UsageError
from growkit.core.progress import Progress, SilentProgress
from growkit.evaluation.model import LoadedModel, check_causal
from growkit.vocabulary.tokenizer_size import check_ids


@dataclass(frozen=True)
class TextScore:
    """Figures of one text.

    Attributes:
        tokens: predicted tokens (all but the first).
        bytes: UTF-8 bytes of the text.
        loss: mean negative log-likelihood, in nats per token.
        perplexity: its exponential.
        bits_per_byte: the whole text's negative log-likelihood in bits over its bytes; comparable
            between tokenizers.
        window, stride: tokens.
    """

    tokens: int
    bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float
    window: int
    stride: int


def spans(total: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first predicted position) of every window over ``total`` tokens.

    Each position from 1 to ``total`` - 1 is predicted exactly once; from the second window on with
    at least ``window`` - ``stride`` tokens of context.
    """
    predicted = 1
    for start in range(0, total, stride):
        end = min(start + window, total)
        if predicted < end:
            yield start, end, predicted
            predicted = end
        if end == total:
            return


@torch.no_grad()
def score_text(
    loaded: LoadedModel,
    text: str,
    *,
    window: int = 1024,
    stride: int | None = None,
    progress: Progress | None = None,
) -> TextScore:
    """Score a text with the model's own tokenizer (its usual special tokens included).

    Args:
        window: tokens the model sees at once; at most its ``max_position_embeddings``.
        stride: tokens between windows; default half a window.

    Raises:
        UsageError: an encoder-decoder, fewer than two tokens, or window and stride that do not fit.
        CheckpointError: the text holds a token for which the embedding has no row.
    """
    check_causal(loaded.model)
    limit = getattr(loaded.model.config, "max_position_embeddings", None) or window
    window = min(window, int(limit))
    stride = stride or max(window // 2, 1)
    if window < 2 or not 0 < stride < window:
        raise UsageError(
            f"--window {window} and --stride {stride} do not fit.",
            "A window has at least 2 tokens and a stride is shorter than it.",
        )
    ids = torch.tensor(loaded.tokenizer(text)["input_ids"], dtype=torch.long)
    if len(ids) < 2:
        raise UsageError(
            f"The text gives {len(ids)} token(s); at least 2 are needed.", "Give a longer text."
        )
    model: Any = loaded.model
    rows = model.get_input_embeddings().weight.shape[0]
    check_ids(int(ids.max()), rows, len(loaded.tokenizer), loaded.path)
    bar = progress or SilentProgress()
    total = 0.0
    for start, end, first in spans(len(ids), window, stride):
        row = ids[start:end].to(loaded.device)
        logits = loaded.model(input_ids=row[None], use_cache=False).logits[0]
        predicted = logits[first - start - 1 : -1].float()
        losses = torch.nn.functional.cross_entropy(
            predicted, row[first - start :], reduction="none"
        )
        total += losses.double().sum().item()
        bar.advance(end - first)
    count, size = len(ids) - 1, len(text.encode("utf-8"))
    loss = total / count
    return TextScore(
        tokens=count,
        bytes=size,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=total / math.log(2) / size,
        window=window,
        stride=stride,
    )
