# SPDX-License-Identifier: Apache-2.0
"""Keywords of a layer: the cache under whichever name this transformers gives it, and the rest.

Up to 5.23 transformers calls a layer's cache ``past_key_values``, from 5.24 on ``cache``. The paged
cache of continuous batching comes as ``cache`` in every version: up to 5.23 the attention function
writes it, from 5.24 on the layer does. So a cache is told by what it is, never by its name.

A keyword that nobody reads is refused: dropped in silence it would change what is computed.

Checked with transformers 5.16, 5.23 and 5.24.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention

from ...core.engines import ENGINES

CACHE_NAMES = ("cache", "past_key_values")

# From 5.24 on transformers' own layers take a cache of any kind as ``cache``, and write it.
LAYERS_WRITE_EVERY_CACHE = "cache" in inspect.signature(LlamaAttention.forward).parameters

# What transformers hands to every layer, and attention functions, losses or output recorders read.
KNOWN = frozenset(
    {
        # every call
        "position_ids",
        "use_cache",
        "cache_position",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "is_causal",
        "kernel_options",  # flex_attention
        # the loss
        "num_items_in_batch",
        "shift_labels",
        "ignore_index",
        # packed sequences
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "seq_idx",
        # continuous batching
        "read_index",
        "write_index",
        "logits_indices",
        "logits_processor_args",
        "block_table",
        "k_cache",
        "v_cache",
        # tokenizers give them; a decoder without segments has no use for them, as Llama has none
        "token_type_ids",
    }
)


def is_paged(cache: Any) -> bool:
    """Whether a cache is the paged one of continuous batching, and no ordinary one."""
    return cache is not None and not isinstance(cache, Cache)


def take_cache(kwargs: dict[str, Any], implementation: str) -> Any:
    """Take the cache out of a layer's keywords, which from then on are those of the attention call.

    Args:
        kwargs: keywords that the layer does not name; the cache is removed.
        implementation: name of the attention function.

    Raises:
        TypeError: two caches, or a keyword that neither the layer nor an attention function of
            transformers reads.
    """
    given = [kwargs.pop(name) for name in CACHE_NAMES if name in kwargs]
    caches = [cache for cache in given if cache is not None]
    if len(caches) > 1:
        raise TypeError("A layer got two caches, as cache= and as past_key_values=; give it one.")
    if implementation not in ENGINES:
        unknown = [name for name in kwargs if name not in KNOWN]
        if unknown:
            raise TypeError(
                f"This model's layers do not know the keywords {unknown}: they would be without "
                "effect. Leave them out (a newer transformers may need `growkit refresh FOLDER`)."
            )
    return caches[0] if caches else None


def written_by_attention(cache: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the attention function, and not the layer, writes this cache."""
    if not is_paged(cache):
        return False
    return not LAYERS_WRITE_EVERY_CACHE or kwargs.get("block_table") is not None


def write_cache(
    cache: Any, key: Tensor, value: Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Add keys and values of new tokens [b, heads, n, d]; all keys and values to attend to.

    Args:
        kwargs: keywords of the attention call, to which a paged cache adds its own.
    """
    if cache is None:
        return key, value
    if not is_paged(cache):
        key, value = cache.update(key, value, layer_idx)
        return key, value
    if not LAYERS_WRITE_EVERY_CACHE:
        kwargs["cache"] = cache
        return key, value
    key, value = cache.update(key, value, layer_idx, kwargs=kwargs)
    return key, value
