"""Attention of packed documents on the CPU, document by document instead of under a dense mask.

Under SDPA transformers keeps packed documents apart by an n x n mask. torch's CPU kernel adds it to
every score, the hidden ones too: a step of 1,024 tokens takes a quarter to a third more, one of
2,048 two thirds. flex_attention has no backward pass on the CPU (torch 2.9 to 2.14), and torch's
``varlen_attn`` no kernel for it. Here the tokens of a batch are cut at document borders into
pieces, and every piece is one call of SDPA: a document under the causal rule, or several short ones
under a mask of at most ``PIECE`` x ``PIECE``. What no document sees is not computed, so that such a
step costs less than one of joined documents (benchmarks/document_masks.py).

The borders are those of the mask function that the model itself makes (a token that does not see
the one before it begins a document), so sliding windows keep their masks, inside of a document.
:func:`attend_by_document` compares the logits with SDPA's before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "growkit_documents"  # value of attn_implementation while a run trains
PIECE = 256  # short documents share a call up to so many tokens; shorter sequences keep SDPA's mask


@dataclass(frozen=True)
class Pieces:
    """What stands for the mask of a batch of sequences that are longer than ``PIECE``.

    Attributes:
        sizes: tokens of each piece; pieces follow each other through the sequences of the batch.
        masks: of each piece [n, n], True where a token is seen; None: every token before it.
    """

    sizes: list[int]
    masks: list[Tensor | None]


def pieces_of(ends: list[int]) -> list[tuple[int, int]]:
    """Documents of a sequence, by their ends, joined up to ``PIECE`` tokens: (start, stop) each.

    >>> pieces_of([100, 200, 300, 1000, 1010])
    [(0, 200), (200, 300), (300, 1000), (1000, 1010)]
    """
    stops: list[int] = []
    start = 0
    for end, following in pairwise([*ends, ends[-1] + PIECE + 1]):
        if following - start > PIECE:
            stops.append(end)
            start = end
    return list(pairwise([0, *stops]))


def document_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **named: Any,
) -> Tensor | Pieces | None:
    """A mask in transformers' interface: ``Pieces`` of whole long sequences, else SDPA's own."""
    whole = q_length == kv_length > PIECE and not q_offset and not kv_offset
    if not whole or mask_function is None or attention_mask is not None or use_vmap:
        if mask_function is not None:
            named["mask_function"] = mask_function
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, attention_mask=attention_mask, use_vmap=use_vmap, device=device,
            **named,
        )  # fmt: skip
    head = torch.zeros((), dtype=torch.long)
    rows, tokens = torch.arange(batch_size)[:, None], torch.arange(q_length)
    sees_last = mask_function(rows, head, tokens[None, 1:], tokens[None, :-1])
    begins = ~sees_last.expand(batch_size, q_length - 1)
    sizes: list[int] = []
    masks: list[Tensor | None] = []
    for row, borders in enumerate(begins):
        ends = [*(borders.nonzero()[:, 0] + 1).tolist(), q_length]
        for start, stop in pieces_of(ends):
            sizes.append(stop - start)
            last, first = tokens[stop - 1], tokens[start]
            if bool(mask_function(rows[row, 0], head, last, first)):  # one document, no window
                masks.append(None)
                continue
            own = tokens[start:stop]
            masks.append(mask_function(rows[row, 0], head, own[:, None], own[None, :]))
    return Pieces(sizes, masks)


def document_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Pieces | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """An attention function in transformers' interface; equals SDPA under the dense mask.

    Args:
        query: [b, heads, n, d].
        key, value: [b, kv heads, n, d]; values may be narrower.

    Returns:
        [b, n, heads, width of the values].
    """
    if not isinstance(attention_mask, Pieces):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **named
        )
    width = value.shape[-1]
    if width < key.shape[-1]:  # the fused kernel wants one width
        value = functional.pad(value, (0, key.shape[-1] - width))
    # One split and one join: slices would fill a whole gradient with zeros for each of them.
    split = [
        states.transpose(1, 2).flatten(0, 1).split(attention_mask.sizes)
        for states in (query, key, value)
    ]
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for parts, mask in zip(zip(*split, strict=True), attention_mask.masks, strict=True):
        own_query, own_key, own_value = (part.transpose(0, 1)[None] for part in parts)
        output = functional.scaled_dot_product_attention(
            own_query, own_key, own_value, attn_mask=mask, dropout_p=dropout,
            is_causal=mask is None, scale=scaling, enable_gqa=grouped,
        )  # fmt: skip
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs).unflatten(0, (query.shape[0], -1))[..., :width], None


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, document_mask)


@torch.no_grad()
def attend_by_document(model: Any) -> bool:
    """Let a model on the CPU whose attention is SDPA attend by :func:`document_attention`.

    Only if its logits for three packed documents stay as they are, up to rounding; else nothing
    changes.
    """
    if model.config._attn_implementation != "sdpa" or model.device.type != "cpu":
        return False
    lengths = (40, PIECE, 100)
    ids = torch.arange(sum(lengths)) * 7 % model.get_input_embeddings().weight.shape[0]
    positions = torch.cat([torch.arange(length) for length in lengths])
    training = model.training
    model.eval()

    def logits() -> Tensor:
        found: Tensor = model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False
        ).logits
        return found

    try:
        expected = logits()
        model.set_attn_implementation(NAME)
        taken = model.config._attn_implementation == NAME
        rounding = torch.finfo(expected.dtype).eps * expected.abs().max().item()
        same = taken and (logits() - expected).abs().max().item() <= 256 * rounding
    except Exception:  # whatever the class objects to, it trains as it is
        same = False
    finally:
        model.train(training)
    if not same:
        model.set_attn_implementation("sdpa")
    return same
