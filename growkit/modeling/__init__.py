"""The Hugging Face models around the attention variants.

Importing this package registers our configs and models with the Auto classes of transformers (and
imports torch): ``gda`` (Grouped Differential Attention) and ``growkit`` (any other variant).
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from growkit.modeling.configuration_gda import GdaConfig
from growkit.modeling.configuration_growkit import GrowkitConfig
from growkit.modeling.decoder import DecoderPreTrainedModel
from growkit.modeling.modeling_gda import GdaForCausalLM, GdaModel, GdaPreTrainedModel
from growkit.modeling.modeling_growkit import GrowkitForCausalLM, GrowkitModel
from growkit.modeling.poly_norm import PolyNorm
from growkit.remote_code import export_code

DecoderPreTrainedModel.code_exporter = staticmethod(export_code)

for _config, _base, _causal in (
    (GdaConfig, GdaModel, GdaForCausalLM),
    (GrowkitConfig, GrowkitModel, GrowkitForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _base, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)

__all__ = [
    "GdaConfig",
    "GdaForCausalLM",
    "GdaModel",
    "GdaPreTrainedModel",
    "GrowkitConfig",
    "GrowkitForCausalLM",
    "GrowkitModel",
    "PolyNorm",
]
