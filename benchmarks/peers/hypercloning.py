"""HyperCloning as published, run the way its release runs: python hypercloning.py SOURCE OUT FACTOR

The algorithm of arXiv:2409.12903, section 3, written anew from the paper and the description of
apple/ml-hypercloning (commit 7c4e80b): a randomly initialised target model is built in memory, then
every layer's weights are tiled into it and divided by the number of input blocks. As in the
release, query heads are multiplied and key/value heads only where the source has as many of them,
and the copies of query heads stand behind each other (tile), whatever the groups. No noise.

It needs transformers 4.45: reaching into modules (``self_attn.num_heads``) ended with version 5.
Standard torch and transformers only; nothing of growkit.
"""

from __future__ import annotations

import copy
import sys

import torch
from transformers import AutoModelForCausalLM


def tiled(weight: torch.Tensor, shape: torch.Size, *, share: bool) -> torch.Tensor:
    """``weight`` repeated to ``shape``; with ``share`` divided by the number of input blocks."""
    repeats = [new // old for new, old in zip(shape, weight.shape, strict=True)]
    grown = weight.repeat(*repeats)
    return grown / repeats[-1] if share else grown


def main(source: str, out: str, factor: int) -> None:
    small = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.bfloat16)
    config = copy.deepcopy(small.config)
    config.hidden_size *= factor
    config.intermediate_size *= factor
    if config.num_key_value_heads == config.num_attention_heads:
        config.num_key_value_heads *= factor
    config.num_attention_heads *= factor
    large = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        targets = dict(large.named_parameters())
        for name, weight in small.named_parameters():
            matrix = weight.ndim == 2 and "embed_tokens" not in name
            targets[name].copy_(tiled(weight, targets[name].shape, share=matrix))
        if small.config.tie_word_embeddings:
            # The release clones the head last, into the tensor that it shares with the embedding.
            large.model.embed_tokens.weight /= factor
    large.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
