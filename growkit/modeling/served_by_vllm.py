"""vLLM serves attention whose signal and noise heads have keys of their own: two calls a layer.

vLLM's transformers backend gives a layer one attention, of the config's heads. Here a layer gets
two of them (signal heads on k1, noise heads on k2) in vLLM's own paged cache. vLLM's kernels want
values as wide as keys, and values are 2d wide: queries and keys are padded with zeros to 2d, which
leaves every score as it is. The cache holds the values once for each map, and the zeros: 8 G d
elements a token and layer for G pairs, where transformers' caches hold 4 G d.

Variants of one call go through the backend as they do without the plugin. One rank only: vLLM 0.32
was run, on a CPU; no GPU was at hand.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM

from growkit.modeling.modeling_gda import GdaModel
from growkit.modeling.modeling_growkit import GrowkitModel
from growkit.variants.gda.attention import TWO_CALL_ENGINE, GdaAttention

PARTS = ("signal", "noise")
MODELS = {model.config_class.model_type: model for model in (GdaModel, GrowkitModel)}


def paged_attention(
    call: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """One of a layer's two calls, in vLLM's cache.

    Args:
        call: says which (``call.part``), and has the layer's attributes.
        query, key: [1, heads, n, d].
        value: [1, kv heads, n, 2d].

    Returns:
        [1, n, heads, 2d], and no softmax maps.
    """
    width = value.shape[-1]
    wide = (pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    flat = (x[0].transpose(0, 1).reshape(x.shape[2], -1) for x in wide)
    output: Tensor = getattr(call, PARTS[call.part])(*flat)
    return output.view(1, query.shape[2], query.shape[1], width), None


ALL_ATTENTION_FUNCTIONS.register(TWO_CALL_ENGINE, paged_attention)


class ServedDecoder(TransformersForCausalLM):
    """``GdaForCausalLM`` and ``GrowkitForCausalLM`` in vLLM."""

    def _patch_config(self) -> None:
        super()._patch_config()
        attention = MODELS[self.config.model_type].attention_class(self.config)
        self.two_calls = issubclass(attention, GdaAttention)
        if self.two_calls:
            self.config._attn_implementation = TWO_CALL_ENGINE

    def _create_attention_instances(self, prefix: str = "") -> None:
        if not self.two_calls:
            super()._create_attention_instances(prefix)
            return
        if self.parallel_config.world_size > 1:
            raise ValueError(
                "growkit serves two attention calls a layer on one rank; leave "
                "--tensor-parallel-size and --pipeline-parallel-size out."
            )
        for index, layer in enumerate(self.model.layers):
            module = layer.self_attn
            heads = module.heads
            for part, count in enumerate((heads.n_signal, heads.n_noise)):
                served = Attention(
                    num_heads=count,
                    head_size=2 * module.head_dim,
                    scale=module.scaling,
                    num_kv_heads=heads.n_kv,
                    cache_config=self.cache_config,
                    quant_config=self.quant_config,
                    # vLLM takes one number out of a name for the place in its cache
                    prefix=f"{prefix}model.layers.{2 * index + part}.self_attn.attn",
                )
                module.add_module(PARTS[part], served)
