# SPDX-License-Identifier: Apache-2.0
"""Configuration of Grouped Differential Attention models (``model_type`` "gda")."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from huggingface_hub.dataclasses import strict

from ..families.lambda_schedule import lambda_init_schedule
from ..variants.gda.attention import GdaAttentionBase
from ..variants.gda.heads import GdaHeads
from .configuration_decoder import DecoderConfig

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


@strict
class GdaConfig(DecoderConfig):
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

    The other fields, and the size of the whole model in closed form, are :class:`DecoderConfig`'s.
    Raises an error that names the fields for a combination that does not fit.

    Of one attention layer, with E hidden, d head_dim, H query heads, G ``num_key_value_heads``, v
    value width (2d with own noise keys, else d), n_S signal heads:

    * parameters = E d (H + 2G) + E n_S v + 4d, plus v with ``sub_layer_norm``;
    * KV cache = 2 G d elements a token.
    """

    model_type = "gda"
    has_no_defaults_at_init = True  # head_dim; older transformers 5 would call GdaConfig()

    num_noise_heads: int | None = None
    noise_keys: str = "own"
    sub_layer_norm: bool = True
    attn_rms_norm_eps: float = 1e-5
    lambda_init: list[float | int] | None = None
    lambda_std: float | int = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_noise_heads is None:
            self.num_noise_heads = self.num_attention_heads // 2
        if self.num_key_value_heads is None:
            stripes = min(self.num_noise_heads, self.num_attention_heads - self.num_noise_heads)
            self.num_key_value_heads = stripes * (2 if self.noise_keys == "own" else 1)
        if self.lambda_init is None:
            self.lambda_init = lambda_init_schedule(self.num_hidden_layers)
        self.set_tp_plan(GdaAttentionBase.tp_plan)
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
        super().validate_architecture()
        self.check_lambda_init(self.lambda_init or [], self.sub_layer_norm)


__all__ = ["GdaConfig"]
