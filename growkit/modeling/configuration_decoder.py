# SPDX-License-Identifier: Apache-2.0
"""What the configs of all our decoders share: sizes and checks."""

from __future__ import annotations

import math
from collections.abc import Mapping

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

ACTIVATIONS = ("silu", "poly_norm")

_MLP_TP_PLAN = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


@strict
class DecoderConfig(PreTrainedConfig):
    r"""A pre-norm decoder with RMSNorm, rotary encoding and a gated feed-forward layer.

    Args:
        attention_bias: q, k and v have a bias (Qwen2).
        attention_output_bias: o has one.
        qk_norm: RMSNorm of every query and key head by itself, before the rotation (Qwen3).
        qk_norm_eps: epsilon of these norms. A field of its own, since growth of the hidden size
            may have to change ``rms_norm_eps``.
        hidden_act: "silu", or "poly_norm" (Motif; adds four parameters a layer).

    Size in closed form, with E hidden, F FFN, V vocabulary, L layers, A parameters and C cached
    elements of one attention layer (in the docstring of each variant):

    * parameters = L [A + 3 E F + 2 E] + E + 2 V E (V E if tied), plus 4 L with "poly_norm"
      In A, biases add one entry a row of q, k, v (and E for o), head norms 2 head_dim;
    * KV cache = L C elements a token.
    """

    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
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
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: bool = False
    qk_norm_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
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

    def set_tp_plan(self, attention: Mapping[str, str]) -> None:
        """Tensor-parallel plan from that of the attention layer's modules ("": the layer)."""
        absent = {"q_norm", "k_norm"} if not self.qk_norm else set()
        if not getattr(self, "sub_layer_norm", None):
            absent.add("subln")
        self.base_model_tp_plan = {
            f"layers.*.self_attn.{name}".rstrip("."): style
            for name, style in attention.items()
            if name not in absent
        }
        if self.hidden_act != "poly_norm":  # it normalises over the whole FFN width: not shardable
            self.base_model_tp_plan |= _MLP_TP_PLAN

    def validate_architecture(self) -> None:
        """Called by ``@strict``: rules that tie several fields together."""
        layers = self.num_hidden_layers
        if layers < 0:
            raise ValueError(f"num_hidden_layers = {layers}: it must be 0 or more.")
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

    def check_lambda_init(self, values: list[float | int], normed: bool) -> None:
        """One finite number a layer; not 1 where (1 - lambda_init) multiplies the output."""
        layers = self.num_hidden_layers
        if len(values) != layers:
            raise ValueError(
                f"lambda_init has {len(values)} values with num_hidden_layers = {layers}: it holds "
                "one number per layer."
            )
        for layer, value in enumerate(values):
            if not math.isfinite(value):
                raise ValueError(f"lambda_init[{layer}] = {value}: it must be a finite number.")
            if normed and value == 1:
                raise ValueError(
                    f"lambda_init[{layer}] = 1 with sub_layer_norm: the output is multiplied by "
                    "(1 - lambda_init) and would be zero; any other number is allowed."
                )


__all__ = ["DecoderConfig"]
