# SPDX-License-Identifier: Apache-2.0
"""Configuration of Grouped Differential Attention models (``model_type`` "gda")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..attention.gda_heads import GdaHeads
from ..families.lambda_schedule import lambda_init_schedule

ACTIVATIONS = ("silu", "poly_norm")

# Fields that mean the same in a Motif config.
MOTIF_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_noise_heads",
    "num_key_value_heads",
    "head_dim",
    "attn_rms_norm_eps",
    "rms_norm_eps",
    "hidden_act",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "use_cache",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
)

_ATTENTION_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    # the lambda vectors: whole on every rank, each of which sees the gradient of its own heads
    "layers.*.self_attn": "replicated_with_grad_allreduce",
}
_NORM_TP_PLAN = {"layers.*.self_attn.subln": "replicated_with_grad_allreduce"}
_MLP_TP_PLAN = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


@strict
class GdaConfig(PreTrainedConfig):
    r"""A decoder with Grouped Differential Attention, DIFF V1 as its 1:1 case, or the plain form.

    Args:
        num_attention_heads: query heads, signal and noise together.
        num_noise_heads: noise heads; half of ``num_attention_heads`` (DIFF V1) if not given.
        num_key_value_heads: key heads as stored: 2 n_kv with ``noise_keys`` "own" (k1, k2 of each
            group), n_kv with "shared". As many as there are stripes of query heads if not given.
        head_dim: width of a query and key head. Required.
        noise_keys: "own" (noise heads have their own keys, values are 2 head_dim wide) or "shared".
        sub_layer_norm: RMSNorm over every head's output, scaled by (1 - lambda_init).
        attn_rms_norm_eps: epsilon of that norm.
        lambda_init: one number per layer; the DIFF Transformer's schedule if not given.
        lambda_std: standard deviation of the lambda vectors of a model made from scratch.
        hidden_act: "silu", or "poly_norm" (Motif; adds four parameters a layer).

    Raises an error that names the fields for a combination that does not fit.

    Size in closed form, with E hidden, F FFN, V vocabulary, L layers, d head_dim, H query heads,
    G ``num_key_value_heads``, v value width (2d with own noise keys, else d), n_S signal heads:

    * parameters = L [E d (H + 2G) + E n_S v + 4d + 3 E F + 2 E] + E + 2 V E (V E if tied),
      plus L v with ``sub_layer_norm``, plus 4 L with "poly_norm" (:meth:`parameter_count`);
    * KV cache = 2 G d L elements a token (:meth:`kv_cache_bytes`).
    """

    model_type = "gda"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    has_no_defaults_at_init = True  # head_dim; older transformers 5 would call GdaConfig()
    # A rank gets whole stripes and whole key/value groups if its count divides both numbers.
    base_model_tp_plan = _ATTENTION_TP_PLAN | _NORM_TP_PLAN | _MLP_TP_PLAN
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_noise_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    noise_keys: str = "own"
    sub_layer_norm: bool = True
    attn_rms_norm_eps: float = 1e-5
    rms_norm_eps: float = 1e-6
    lambda_init: list[float | int] | None = None
    lambda_std: float | int = 0.1
    hidden_act: str = "silu"
    rope_parameters: dict | None = None
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    initializer_range: float | int = 0.02
    use_cache: bool = True
    attention_dropout: float | int = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_noise_heads is None:
            self.num_noise_heads = self.num_attention_heads // 2
        if self.num_key_value_heads is None:
            stripes = min(self.num_noise_heads, self.num_attention_heads - self.num_noise_heads)
            self.num_key_value_heads = stripes * (2 if self.noise_keys == "own" else 1)
        if self.lambda_init is None:
            self.lambda_init = lambda_init_schedule(self.num_hidden_layers)
        self.base_model_tp_plan = dict(_ATTENTION_TP_PLAN)
        if self.sub_layer_norm:
            self.base_model_tp_plan |= _NORM_TP_PLAN
        if self.hidden_act != "poly_norm":  # it normalises over the whole FFN width: not shardable
            self.base_model_tp_plan |= _MLP_TP_PLAN
        super().__post_init__(**kwargs)

    @property
    def heads(self) -> GdaHeads:
        """Head counts in the terms of the attention; raises ValueError if they do not fit."""
        return GdaHeads.from_fields(
            self.num_attention_heads,
            self.num_noise_heads or 0,
            self.num_key_value_heads or 0,
            self.head_dim,
            self.noise_keys,
        )

    @property
    def n_signal(self) -> int:
        """Signal heads: the heads that have an output."""
        return self.heads.n_signal

    @property
    def n_kv(self) -> int:
        """Key/value groups."""
        return self.heads.n_kv

    @property
    def ratio(self) -> Fraction:
        """Signal heads per noise head."""
        return self.heads.ratio

    @property
    def value_dim(self) -> int:
        """Width of one head's value and output."""
        return self.heads.value_dim

    def parameter_count(self, *, embeddings: bool = True) -> int:
        """Parameters in closed form, with or without the embedding and output matrices."""
        poly_norm = 4 if self.hidden_act == "poly_norm" else 0
        layer = (
            self.heads.parameters(self.hidden_size, self.sub_layer_norm)
            + 3 * self.hidden_size * self.intermediate_size
            + 2 * self.hidden_size
            + poly_norm
        )
        total = self.num_hidden_layers * layer + self.hidden_size
        if embeddings:
            matrices = 1 if self.tie_word_embeddings else 2
            total += matrices * self.vocab_size * self.hidden_size
        return total

    def kv_cache_bytes(self, tokens: int = 1, element_bytes: int = 2) -> int:
        """Bytes of the key/value cache for ``tokens`` tokens of one sequence (bf16 by default)."""
        return tokens * self.num_hidden_layers * self.heads.kv_cache_elements * element_bytes

    @classmethod
    def from_motif(cls, config: Mapping[str, Any]) -> GdaConfig:
        """The same model as a Motif config (2.6B or 2-12.7B), whose tensors then load by name.

        Without ``num_noise_heads`` half of the heads are noise heads (DIFF V1). lambda_init follows
        Motif's schedule. Raises ValueError for Motif options that this model does not have.
        """
        for field, plain in (("k_ratio", (None, 1)), ("use_bias", (None, False))):
            if config.get(field) not in plain:
                raise ValueError(f"{field} = {config[field]!r} of a Motif config: not supported.")
        if config.get("use_sliding_window"):
            raise ValueError("use_sliding_window = true of a Motif config: not supported.")
        fields = {name: config[name] for name in MOTIF_FIELDS if config.get(name) is not None}
        if "head_dim" not in fields and "num_noise_heads" not in fields:
            fields["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        fields.setdefault("hidden_act", "poly_norm")
        fields.setdefault("num_key_value_heads", config["num_attention_heads"])
        schedule = lambda_init_schedule(config["num_hidden_layers"], "motif")
        return cls(**fields, lambda_init=schedule, noise_keys="own", sub_layer_norm=True)

    def validate_architecture(self) -> None:
        """Called by ``@strict``: every rule that ties several fields together."""
        _ = self.heads
        layers = self.num_hidden_layers
        if layers < 1:
            raise ValueError(f"num_hidden_layers = {layers}: at least one layer is needed.")
        values = self.lambda_init or []
        if len(values) != layers:
            raise ValueError(
                f"lambda_init has {len(values)} values with num_hidden_layers = {layers}: it holds "
                "one number per layer."
            )
        for layer, value in enumerate(values):
            if not math.isfinite(value):
                raise ValueError(f"lambda_init[{layer}] = {value}: it must be a finite number.")
            if self.sub_layer_norm and value == 1:
                raise ValueError(
                    f"lambda_init[{layer}] = 1 with sub_layer_norm: the output is multiplied by "
                    "(1 - lambda_init) and would be zero; any other number is allowed."
                )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act = {self.hidden_act!r}: it must be one of {ACTIVATIONS}.")
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout = {self.attention_dropout}: dropout is not defined for a "
                "difference of attention maps; only 0.0 is allowed."
            )
        partial = (self.rope_parameters or {}).get("partial_rotary_factor")
        if partial not in (None, 1, 1.0):
            raise ValueError(
                f"rope_parameters.partial_rotary_factor = {partial}: all of head_dim is rotated; "
                "only 1.0 is allowed."
            )


__all__ = ["GdaConfig"]
