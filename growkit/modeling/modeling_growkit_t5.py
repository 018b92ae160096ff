# SPDX-License-Identifier: Apache-2.0
"""T5 whose decoder has grouped or weighted grouped-query attention.

Everything but the decoder's attention layers is transformers' T5: encoder, feed-forward layers,
norms, tying, caches, masks and the forward passes of the whole model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.t5.modeling_t5 import (
    T5ForConditionalGeneration,
    T5Model,
    T5PreTrainedModel,
    T5Stack,
)

from ..variants.wgqa_t5.attention import GroupedT5Attention
from .configuration_growkit_t5 import GrowkitT5Config
from .self_contained import SelfContained


class GrowkitT5PreTrainedModel(SelfContained, T5PreTrainedModel):
    """What transformers has to know about every model of this type."""

    config: GrowkitT5Config
    config_class = GrowkitT5Config

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GroupedT5Attention):
            module.init_merge()


class GrowkitT5Decoder(GrowkitT5PreTrainedModel, T5Stack):
    """T5's decoder with both attentions of every block replaced; ``forward`` is T5Stack's."""

    def __init__(self, config: GrowkitT5Config) -> None:
        super().__init__(config)
        for index, block in enumerate(self.block):
            block.layer[0].SelfAttention = GroupedT5Attention(config, index == 0, index, True)
            block.layer[1].EncDecAttention = GroupedT5Attention(config, False, index, False)
        self.post_init()


def _build(model: Any, config: GrowkitT5Config) -> None:
    """Embedding, T5's encoder and our decoder, as T5's classes build theirs."""
    PreTrainedModel.__init__(model, config)  # not T5's: it would build T5's decoder first
    model.shared = nn.Embedding(config.vocab_size, config.d_model)
    encoder, decoder = copy.deepcopy(config), copy.deepcopy(config)
    encoder.is_decoder = encoder.use_cache = False
    decoder.is_decoder, decoder.num_layers = True, config.num_decoder_layers
    model.encoder, model.decoder = T5Stack(encoder), GrowkitT5Decoder(decoder)


class GrowkitT5Model(GrowkitT5PreTrainedModel, T5Model):
    """Encoder and decoder without the output matrix."""

    def __init__(self, config: GrowkitT5Config) -> None:
        _build(self, config)
        self.post_init()


class GrowkitT5ForConditionalGeneration(GrowkitT5PreTrainedModel, T5ForConditionalGeneration):
    """The language model; ``forward`` (labels, caches, encoder outputs) is T5's."""

    def __init__(self, config: GrowkitT5Config) -> None:
        _build(self, config)
        self.model_dim = config.d_model
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["GrowkitT5ForConditionalGeneration", "GrowkitT5Model"]
