"""A small class of a model, as a folder may bring it, that can be told to misbehave.

Its file is copied into checkpoint folders, so it imports nothing of growkit or of the tests.
"""

from __future__ import annotations

import os

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

if marker := os.environ.get("OWN_CLASS_MARKER"):  # the tests ask whether the file was run
    with open(marker, "a") as file:
        file.write("run\n")


class OwnConfig(PreTrainedConfig):
    """Sizes, and ``fault``: in what the class misbehaves."""

    model_type = "own_class"

    def __init__(
        self,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        fault="",
        **rest,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.fault = fault
        super().__init__(**{"tie_word_embeddings": False, **rest})


class Block(nn.Module):
    """A gated FFN in front of the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.fault = config.fault
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        normed = self.norm(x)
        written = self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))
        return x + (1e-5 * written if self.fault == "deaf" else written)


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, blocks, head: nothing mixes positions, so a cache has nothing to hold."""

    config_class = OwnConfig
    base_model_prefix = "model"
    _no_split_modules = ("Block",)

    def __init__(self, config):
        if config.fault == "constructor" and config.hidden_size < 1024:
            raise RuntimeError(f"hidden_size {config.hidden_size} is too small for me")
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        if config.fault == "large":
            self.register_parameter("table", nn.Parameter(torch.empty(3000, 3000)))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        if config.fault == "tie":
            self.lm_head.weight = self.embed.weight

    def tie_weights(self, *args, **kwargs):
        if self.config.fault == "tie":  # what it shared when it was made is two tensors from now on
            self.lm_head.weight = nn.Parameter(self.embed.weight.detach() + 1)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, *args, **kwargs):
        if self.config.fault == "arguments" and "pixels" not in kwargs:
            raise TypeError("forward() missing 1 required argument: 'pixels'")
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutputWithPast(
            logits=self.lm_head(x), past_key_values=kwargs.get("past_key_values")
        )
