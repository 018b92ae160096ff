"""The Hugging Face model around the attention variants.

Importing this package registers GdaConfig, GdaModel and GdaForCausalLM with the Auto classes of
transformers (and imports torch).
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from growkit.modeling.configuration_gda import GdaConfig
from growkit.modeling.modeling_gda import GdaForCausalLM, GdaModel, GdaPreTrainedModel
from growkit.modeling.poly_norm import PolyNorm
from growkit.remote_code import export_code

GdaPreTrainedModel.code_exporter = staticmethod(export_code)

AutoConfig.register("gda", GdaConfig, exist_ok=True)
AutoModel.register(GdaConfig, GdaModel, exist_ok=True)
AutoModelForCausalLM.register(GdaConfig, GdaForCausalLM, exist_ok=True)

__all__ = ["GdaConfig", "GdaForCausalLM", "GdaModel", "GdaPreTrainedModel", "PolyNorm"]
