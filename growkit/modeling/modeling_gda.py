# SPDX-License-Identifier: Apache-2.0
"""GdaModel and GdaForCausalLM: our decoder with Grouped Differential Attention.

Tensor names are Motif's.
"""

from __future__ import annotations

from typing import Any

from ..variants.gda.attention import GdaAttention, GdaSharedKeyAttention
from ..variants.shared.one_call import AttentionBase
from .configuration_gda import GdaConfig
from .decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel

ATTENTION_CLASSES = {"own": GdaAttention, "shared": GdaSharedKeyAttention}


class GdaPreTrainedModel(DecoderPreTrainedModel):
    """What transformers has to know about every GDA model."""

    config: GdaConfig
    config_class = GdaConfig

    @staticmethod
    def attention_class(config: Any) -> type[AttentionBase]:
        """By ``noise_keys``."""
        return ATTENTION_CLASSES[config.noise_keys]


class GdaModel(GdaPreTrainedModel, DecoderModel):
    """The decoder without the output matrix."""


class GdaForCausalLM(GdaPreTrainedModel, DecoderForCausalLM):
    """The language model."""

    model_class = GdaModel


__all__ = ["GdaForCausalLM", "GdaModel", "GdaPreTrainedModel"]
