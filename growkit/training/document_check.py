"""Does a model keep packed documents apart? Asked of the model itself before the first step.

transformers makes the block-diagonal mask from ``position_ids`` that restart, but only for classes
that build their mask with its functions, only without an attention mask and only without a cache.
A class that ignores them would train on documents that see each other, and nothing would be said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from growkit.core.errors import UsageError
from growkit.training.document_attention import PIECE, attend_by_document

LENGTH = 8


@torch.no_grad()
def leak(model: Any) -> tuple[float, float]:
    """How far the logits of a second document move when the first one is another text.

    Returns:
        (largest difference of a logit, rounding error of the largest logit): two documents of 8
        tokens in one sequence, with every token of the first one exchanged.
    """
    training = model.training
    model.eval()
    try:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(2 * LENGTH, device=model.device) * 7 % vocabulary
        others = ids.clone()
        others[:LENGTH] = (ids[:LENGTH] + vocabulary // 2) % vocabulary
        positions = torch.arange(LENGTH, device=model.device).repeat(2)
        one, other = (
            model(input_ids=tokens[None], position_ids=positions[None], use_cache=False).logits[
                0, LENGTH:
            ]
            for tokens in (ids, others)
        )
        precision = torch.finfo(one.dtype).eps * one.abs().max().item()
        return (one - other).abs().max().item(), precision
    finally:
        model.train(training)


def check_separate(model: Any) -> None:
    """Refuse a model in which one document of a sequence sees another.

    Raises:
        UsageError: its attention does not follow position_ids.
    """
    try:
        difference, precision = leak(model)
    except TypeError as error:
        raise UsageError(
            f"{type(model).__name__} takes no position_ids, so it cannot keep documents apart.",
            "Set data.document_attention: joined.",
        ) from error
    if difference > 8 * precision:
        raise UsageError(
            f"{type(model).__name__} lets documents of one sequence see each other: the logits of "
            f"one moved by {difference:.3g} when another one changed.",
            "Set data.document_attention: joined, or model.attn_implementation: sdpa, eager or "
            "flash_attention_2 if it was another one.",
        )


class DocumentCheck(TrainerCallback):
    """:func:`check_separate` when the training begins, with the model where it will be trained.

    On the CPU the model then attends document by document, where it can and gains by it.

    Args:
        length: of the run's sequences.
        say: told so.
    """

    def __init__(self, length: int, say: Callable[[str], None]) -> None:
        self.length, self.say = length, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        model = objects["model"]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            check_separate(model)
        # A compiler would unroll the pieces of every batch.
        if self.length > PIECE and not args.torch_compile and attend_by_document(model):
            self.say("packed documents: one attention call a document, no dense mask")
