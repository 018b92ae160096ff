# SPDX-License-Identifier: Apache-2.0
"""The decoder body of all our models: a Llama-shaped model around any attention variant.

Norms, rotary embedding and the forward passes of the whole model are those of transformers' Llama,
so caches, masks, packing and output capturing follow the library.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from ..core.engines import ENGINES
from ..families.lambda_schedule import LAMBDA_ROLES
from ..variants.shared.layer_keywords import CACHE_NAMES
from ..variants.shared.linear_weights import LinearWeights
from ..variants.shared.one_call import AttentionBase
from .configuration_decoder import DecoderConfig
from .poly_norm import PolyNorm
from .self_contained import SelfContained


def check_engine(config: DecoderConfig, attention: type[AttentionBase]) -> None:
    """Raise ValueError where a serving engine would compute something else, or fail in its kernels.

    Engines build the model with their own attention function and one attention layer of the
    config's head counts for each of ours.
    """
    engine, obstacle = config._attn_implementation, attention.engine_obstacle(config)
    if engine in ENGINES and obstacle:
        raise ValueError(
            f"{engine} cannot serve this model: {obstacle}. Serve it with transformers, or convert "
            "it (growkit convert; docs/serving.md lists the variants that are served)."
        )


def check_tensor_parallel(config: DecoderConfig, attention: type[AttentionBase]) -> None:
    """Raise ValueError for sizes that ranks cannot share: a head, or a signal head and what is
    subtracted from it, would be cut in two, and something else be computed."""
    ranks = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
    split = "layers.*.mlp.gate_proj" in (config.base_model_tp_plan or {})
    counts = {
        "key/value groups (a group keeps its signal and noise heads)": attention.groups_of_ranks(
            config
        ),
        "FFN units": config.intermediate_size if split else None,
    }
    for what, count in counts.items():
        if count is not None and count % ranks:
            raise ValueError(
                f"tp_size {ranks} does not divide the model's {count} {what}. Use a tp_size that "
                "does, or split over the data (parallel.strategy: fsdp)."
            )


class GatedMLP(nn.Module):
    """Gated feed-forward layer: down(act(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        poly_norm = config.hidden_act == "poly_norm"
        self.act_fn = PolyNorm() if poly_norm else ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, hidden_size] -> the same shape."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, attention: AttentionBase) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = GatedMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Residual stream [b, n, hidden_size] -> the same shape; keywords are the attention's."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DecoderPreTrainedModel(SelfContained, PreTrainedModel):
    """What transformers has to know about every model of ours."""

    config: DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    # lambda is exp of a dot product: bf16 vectors would move it visibly
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = list(LAMBDA_ROLES)
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": DecoderLayer,
        "attentions": AttentionBase,
    }

    @staticmethod
    def attention_class(config: Any) -> type[AttentionBase]:
        """The attention of a config."""
        raise NotImplementedError

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AttentionBase):
            module.init_weights()
        elif isinstance(module, LinearWeights):  # as the library starts a linear layer
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, PolyNorm):
            init.constant_(module.weight, 1 / 3)
            init.zeros_(module.bias)


class DecoderModel(DecoderPreTrainedModel, LlamaModel):
    """The decoder without the output matrix; ``forward`` is LlamaModel's."""

    def __init__(self, config: DecoderConfig) -> None:
        # Not LlamaModel's: it would build Llama layers first
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        attention = self.attention_class(config)
        check_engine(config, attention)
        check_tensor_parallel(config, attention)
        layers = (
            DecoderLayer(config, attention(config, layer))
            for layer in range(config.num_hidden_layers)
        )
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DecoderForCausalLM(DecoderPreTrainedModel, LlamaForCausalLM):
    """The language model; ``forward`` (labels, cache, logits_to_keep ...) is LlamaForCausalLM's."""

    model_class: ClassVar[type[DecoderModel]]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DecoderConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
