# SPDX-License-Identifier: Apache-2.0
"""GrowkitModel and GrowkitForCausalLM: our decoder with any attention variant of the table."""

from __future__ import annotations

from typing import Any

from ..variants.shared.one_call import AttentionBase
from .configuration_growkit import GrowkitConfig
from .decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel


class GrowkitPreTrainedModel(DecoderPreTrainedModel):
    """What transformers has to know about every model of this type."""

    config: GrowkitConfig
    config_class = GrowkitConfig

    @staticmethod
    def attention_class(config: Any) -> type[AttentionBase]:
        """By the config field ``attention``."""
        return config.variant


class GrowkitModel(GrowkitPreTrainedModel, DecoderModel):
    """The decoder without the output matrix."""


class GrowkitForCausalLM(GrowkitPreTrainedModel, DecoderForCausalLM):
    """The language model."""

    model_class = GrowkitModel


__all__ = ["GrowkitForCausalLM", "GrowkitModel", "GrowkitPreTrainedModel"]
