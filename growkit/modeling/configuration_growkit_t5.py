# SPDX-License-Identifier: Apache-2.0
"""Configuration of T5 with grouped attention in its decoder (``model_type`` "growkit_t5")."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.t5.configuration_t5 import T5Config

from ..variants.shared.one_call import check_divides
from ..variants.wgqa.attention import INITS, WEIGHTS

ATTENTIONS = ("gqa", "wgqa")


@strict
class GrowkitT5Config(T5Config):
    r"""T5 whose decoder shares key/value heads, in self- and in cross-attention.

    Args:
        decoder_num_key_value_heads: key/value heads of the decoder's attention, G; it has to divide
            ``num_heads``, which it is if not given.
        decoder_attention: "gqa", or "wgqa" (heads merged by learned weights).
        wgqa_weights: "wgqa": "scalar" (default), "column" or "row".
        wgqa_init: "wgqa": "mean" (default) or "random", for a model made from scratch.

    The other fields are T5Config's; the encoder is T5's. Formulas, parameter and KV-cache counts:
    ``growkit/variants/wgqa_t5/attention.py``.

    Raises an error that names the fields for a combination that does not fit.
    """

    model_type = "growkit_t5"

    decoder_num_key_value_heads: int | None = None
    decoder_attention: str = "gqa"
    wgqa_weights: str | None = None
    wgqa_init: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.decoder_num_key_value_heads is None:
            self.decoder_num_key_value_heads = self.num_heads
        if self.decoder_attention == "wgqa":
            self.wgqa_weights = self.wgqa_weights or "scalar"
            self.wgqa_init = self.wgqa_init or "mean"
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Called by ``@strict``: the rules of the fields above, then T5Config's."""
        if self.decoder_attention not in ATTENTIONS:
            raise ValueError(
                f"decoder_attention = {self.decoder_attention!r}: it must be one of {ATTENTIONS}."
            )
        check_divides(self, "decoder_num_key_value_heads", self.num_heads, "num_heads")
        for field, valid in (("wgqa_weights", WEIGHTS), ("wgqa_init", INITS)):
            value = getattr(self, field)
            if self.decoder_attention != "wgqa" and value is not None:
                raise ValueError(
                    f"{field} = {value!r} with decoder_attention = {self.decoder_attention!r}: "
                    "only wgqa has this field; leave it out."
                )
            if self.decoder_attention == "wgqa" and value not in valid:
                raise ValueError(f"{field} = {value!r}: it must be one of {valid}.")
        super().validate_architecture()


__all__ = ["GrowkitT5Config"]
