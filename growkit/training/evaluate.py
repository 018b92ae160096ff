"""Held-out loss, perplexity and bits per byte, of all held-out text and of each source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from growkit.data.packing import IGNORED, PackedDataset
from growkit.training.parallel.context_parallel import SplitSequences
from growkit.training.parallel.processes import Processes


@torch.no_grad()
def evaluate(
    model: Any,
    dataset: PackedDataset,
    *,
    batch_size: int,
    bytes_per_token: float | None = None,
    processes: Processes | None = None,
    split: SplitSequences | None = None,
) -> dict[str, float]:
    """Mean negative log-likelihood over every predicted token of a packed dataset.

    The first token of a sequence is not predicted, nor that of a separate document. Sums are kept
    in float64 and weighted by token, so a shorter last batch does not distort the mean; no random
    numbers are drawn.

    Args:
        bytes_per_token: average UTF-8 bytes of a token; default: what the dataset knows.
        processes: they take the batches in turn, and all get the result.
        split: how some of them share a batch.

    Returns:
        ``eval_loss`` (nats per token), ``perplexity`` (its exponential, at most e^700) and, when
        the bytes of the held-out text are known, ``bits_per_byte``; with several sources also
        ``eval_loss/NAME`` of each.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0.0
    by_source = {}
    try:
        for name, indices in dataset.parts().items():
            among = processes or Processes()
            loss, tokens = _sum(model, dataset, indices, batch_size, among, split)
            by_source[f"eval_loss/{name}"] = loss / max(tokens, 1)
            total, count = total + loss, count + tokens
    finally:
        model.train(training)
    mean = total / count
    result = {"eval_loss": mean, "perplexity": math.exp(min(mean, 700.0))}
    bytes_per_token = bytes_per_token or dataset.bytes_per_token
    if bytes_per_token:
        result["bits_per_byte"] = mean / math.log(2) / bytes_per_token
    return result | (by_source if len(by_source) > 1 else {})


def _sum(
    model: Any,
    dataset: PackedDataset,
    indices: Sequence[int],
    batch_size: int,
    processes: Processes,
    split: SplitSequences | None,
) -> tuple[float, float]:
    """(sum of the losses in nats, predicted tokens) of some sequences, over all processes."""
    total, count = 0.0, 0
    starts = range(0, len(indices), batch_size)
    for turn in range(0, len(starts), processes.readers):
        mine = turn + processes.reader
        # A sharded model needs every process in every forward pass: one without a batch of its own
        # repeats the first, and does not count it.
        start = starts[mine if mine < len(starts) else 0]
        items = [dataset[i] for i in indices[start : start + batch_size]]
        batch = {
            key: torch.stack([item[key] for item in items]).to(model.device) for key in items[0]
        }
        if processes.context == 1 or split is None:
            labels = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        else:
            with split.applied(model, batch) as own:
                del own["labels"]
                labels = own.pop("shift_labels").flatten()
                logits = model(**own, use_cache=False).logits.flatten(0, 1).float()
        losses = torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORED, reduction="none"
        )
        if mine < len(starts):
            total += losses.double().sum().item()
            count += int((labels != IGNORED).sum())
    total, counted = processes.sum([total, float(count)])
    return total, counted
