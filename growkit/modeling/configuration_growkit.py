# SPDX-License-Identifier: Apache-2.0
"""Configuration of a decoder with any attention variant (``model_type`` "growkit")."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict

from ..variants.attentions import VARIANTS
from ..variants.shared.one_call import AttentionBase
from .configuration_decoder import DecoderConfig


@strict
class GrowkitConfig(DecoderConfig):
    r"""A decoder whose attention is chosen by one field.

    Formulas, tensor layouts, parameter and KV-cache counts of each variant are in the docstring of
    its folder in ``growkit/variants/``. A field that the chosen variant does not have is refused.

    Args:
        attention: "gqa" (MHA, MQA and GQA by ``num_key_value_heads``), "diff_v1", "diff_v2",
            "gda_gated", "shared_diff", "wgqa", "sas", or "unilm_diff_v1" (DIFF V1 in the layout of
            Microsoft's own files).
        num_attention_heads: query heads of the attention call, noise heads and second maps
            included (as many softmax maps as there are in a layer; "sas": before simulation).
        num_key_value_heads: key (and value) heads that the query heads share; by default the
            most that the variant allows.
        head_dim: width of a query and key head; hidden_size / num_attention_heads if not given.
        num_noise_heads: "gda_gated": subtracted heads among ``num_attention_heads``.
        sub_layer_norm: "diff_v1", "shared_diff": RMSNorm of every head's output, scaled by
            (1 - lambda_init); true if not given.
        attn_rms_norm_eps: epsilon of that norm.
        lambda_init: the same variants: one number a layer; the DIFF Transformer's if not given.
        query_rank, key_rank: "shared_diff": rank of the two maps' updates; ``key_rank`` 0 leaves
            the keys to both maps (cache of plain GQA).
        wgqa_weights: "wgqa": "scalar" (default), "column" or "row".
        wgqa_init: "mean" (default) or "random", for a model made from scratch.
        num_simulated_heads, simulated_head_dim, sas_kernel_size: "sas": H', D' and k.
        lambda_std: standard deviation of the lambda vectors of a model made from scratch.

    The other fields, and the size of the whole model in closed form, are :class:`DecoderConfig`'s.
    Raises an error that names the fields for a combination that does not fit.
    """

    model_type = "growkit"

    attention: str = "gqa"
    num_noise_heads: int | None = None
    sub_layer_norm: bool | None = None
    attn_rms_norm_eps: float = 1e-5
    lambda_init: list[float | int] | None = None
    lambda_std: float | int = 0.1
    query_rank: int | None = None
    key_rank: int | None = None
    wgqa_weights: str | None = None
    wgqa_init: str | None = None
    num_simulated_heads: int | None = None
    simulated_head_dim: int | None = None
    sas_kernel_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        variant = self.variant
        if self.head_dim is None:
            self.head_dim = self._derived_head_dim()
        for field, value in variant.defaults(self).items():
            if getattr(self, field) is None:
                setattr(self, field, value)
        self.set_tp_plan(variant.tp_plan)
        super().__post_init__(**kwargs)

    @property
    def variant(self) -> type[AttentionBase]:
        """The attention class; raises ValueError for an unknown name."""
        if self.attention not in VARIANTS:
            raise ValueError(f"attention = {self.attention!r}: it must be one of {[*VARIANTS]}.")
        return VARIANTS[self.attention].for_config(self)

    def _derived_head_dim(self) -> int:
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"head_dim is not given, and hidden_size = {self.hidden_size} is no multiple of "
                f"num_attention_heads = {self.num_attention_heads}: set head_dim."
            )
        return self.hidden_size // self.num_attention_heads

    def validate_architecture(self) -> None:
        """Called by ``@strict``: every rule that ties several fields together."""
        variant = self.variant
        self._check_foreign_fields(variant)
        for field in ("num_attention_heads", "num_key_value_heads"):
            if (getattr(self, field) or 0) < 1:
                raise ValueError(f"{field} = {getattr(self, field)}: it must be positive.")
        if not self.head_dim or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim = {self.head_dim}: it must be a positive even number (rotary position "
                "embeddings rotate pairs)."
            )
        variant.check(self)
        super().validate_architecture()
        if self.lambda_init is not None:
            self.check_lambda_init(self.lambda_init, bool(self.sub_layer_norm))

    def _check_foreign_fields(self, variant: type[AttentionBase]) -> None:
        for field in sorted({name for known in VARIANTS.values() for name in known.fields}):
            if field not in variant.fields and getattr(self, field) is not None:
                owners = [name for name, known in VARIANTS.items() if field in known.fields]
                raise ValueError(
                    f"{field} = {getattr(self, field)!r} with attention = {self.attention!r}: only "
                    f"{', '.join(owners)} has this field; leave it out."
                )


__all__ = ["GrowkitConfig"]
