"""The Hugging Face models around the attention variants.

Importing this package registers our configs and models with the Auto classes of transformers (and
imports torch): ``gda`` (Grouped Differential Attention), ``growkit`` (any other variant) and
``growkit_t5`` (T5 with grouped or weighted grouped attention in its decoder).
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from growkit.model_code.exported import export_code
from growkit.modeling.configuration_gda import GdaConfig
from growkit.modeling.configuration_growkit import GrowkitConfig
from growkit.modeling.configuration_growkit_t5 import GrowkitT5Config
from growkit.modeling.modeling_gda import GdaForCausalLM, GdaModel, GdaPreTrainedModel
from growkit.modeling.modeling_growkit import GrowkitForCausalLM, GrowkitModel
from growkit.modeling.modeling_growkit_t5 import (
    GrowkitT5ForConditionalGeneration,
    GrowkitT5Model,
)
from growkit.modeling.poly_norm import PolyNorm
from growkit.modeling.self_contained import SelfContained

SelfContained.code_exporter = staticmethod(export_code)

for _config, _base, _causal in (
    (GdaConfig, GdaModel, GdaForCausalLM),
    (GrowkitConfig, GrowkitModel, GrowkitForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _base, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)
AutoConfig.register(GrowkitT5Config.model_type, GrowkitT5Config, exist_ok=True)
AutoModel.register(GrowkitT5Config, GrowkitT5Model, exist_ok=True)
AutoModelForSeq2SeqLM.register(GrowkitT5Config, GrowkitT5ForConditionalGeneration, exist_ok=True)


def register_with_vllm() -> None:
    """vLLM calls this in each of its processes, as the entry point of a general plugin."""
    from vllm import ModelRegistry

    for model in (GdaForCausalLM, GrowkitForCausalLM):
        served = "growkit.modeling.served_by_vllm:ServedDecoder"
        ModelRegistry.register_model(model.__name__, served)


__all__ = [
    "GdaConfig",
    "GdaForCausalLM",
    "GdaModel",
    "GdaPreTrainedModel",
    "GrowkitConfig",
    "GrowkitForCausalLM",
    "GrowkitModel",
    "GrowkitT5Config",
    "GrowkitT5ForConditionalGeneration",
    "GrowkitT5Model",
    "PolyNorm",
]
