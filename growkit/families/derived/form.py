"""Families as data: tables that :mod:`growkit.derive` made of a class of transformers and proved.

A table is one JSON object (its form: :data:`KEYS`). It ships in ``derived_tables/``, or lies in the
user's cache folder, as ``TYPE-HASH.json``; reading it imports no torch. It holds for configs of its
model type whose flags are those that it was derived with.

A dimension of a tensor is ``[reads, segments]``: it writes its units (0), reads them (1), or is a
norm's gain or bias over them (2). A segment is ``[over, [[axis, block], ...]]``: for
each unit of ``over`` the units of the axes that belong to it, ``block`` elements each. A block, as
any size, is a sum of products: ``[[2, "heads", "head_dim"], [4]]``; a name behind "/" divides.
``[["stored", name, dimension]]`` is as large as it is in the file.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

from growkit.families.base import Config

FORMAT = 1
MAX_BYTES = 4_000_000
KEYS = {
    "format": "of this file",
    "model_type": "of config.json",
    "class": "name of the model class",
    "transformers": "version that it was derived with",
    "source": "hash of the files that define the class and its config",
    "date": "when",
    "place": "path of the part of the config that speaks of the layers",
    "flags": "path in that part -> value that a config must have",
    "kinds": "list in that part -> words that may stand in it",
    "defaults": "path -> value where config.json is silent",
    "implied": "path -> [rule, paths] where config.json is silent or null",
    "layers": "field, counts (field -> leading, trailing), period, lists (name -> period), other, "
    "first (layers at the beginning of a kind of their own), sections (fields that count the "
    "layers of sections one behind another)",
    "axes": "axis -> paths of the numbers that count it; PATH/2: a unit counts twice; "
    "FACTOR*SIZE%MULTIPLE: a factor of another size, rounded up",
    "numbers": "further paths that sizes depend on",
    "patterns": "which layers have a tensor: a name of one of them, and a rule for its config",
    "cost": "elements of a cache a layer and token, and width of all heads",
    "tied": "output projection equals the embedding: null (never), true, or by the flag (^flag: "
    "of the whole config)",
    "tensors": "role, name, dims, closes, passes_on, gain_offset, init, layers, experts, stack, "
    "keys (dimension, axis and part of attention keys)",
    "heads": "of the size of heads: scaled (the softmax divides by its root), rotary (field of the "
    "factor of rotated channels and its default, or null)",
    "whole": "axes that a norm runs over",
    "operators": "option -> proof (error, control, request) or why not",
    "stream": "of the hidden size: sqrt_embedding, root_divided, norm (eps_field, eps, centred, "
    "shared, shared_inputs: roles of what those norms read; or why not padded), tied (why it "
    "cannot grow with tied embeddings)",
    "fills": "axis of heads that fill the hidden size (so that both grow together) -> numbers that "
    "it is multiplied by for that; true: query_head, by none",
    "carried": "beginnings of the names of other parts, which are copied as they are stored",
    "projected": "of these, tensors with dimensions of the residual stream: [pattern of names, "
    "dimensions, null where it is as it is stored]",
    "copied": "patterns of stored tensors that the class ignores",
    "kind": "encoder or encoder_decoder; a decoder where it is silent",
    "prefix": "of the names of the model's body, which files may lack",
    "spellings": "path -> another name that config.json may hold it under",
    "divides": "the config class, if it wants the hidden size to be a multiple of the heads",
    "rounded": "widths that the class makes others of unless a flag has this value: flag, exact, "
    "stored (axis -> tensor, dimension, elements of a unit)",
    "blocks": "where config.json may have several entries for each layer: how many (each), fields "
    "that count them, list that has them, words that tell so",
    "older": "path -> an older name in config.json, which the class obeys first",
    "second": "the decoder's stack: field of its number, place of its part, counts, first",
}
Product = Sequence[Any]
# Names of classes whose files hold other tensors than those of the causal language model.
OTHER_HEADS = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "EncoderModel",
)
# Options that the proof of another one speaks for.
SPOKEN_FOR = {
    "--layers-from": "--layers",
    "--tokenizer": "--vocab",
    "--add-tokens": "--vocab",
    "--pad-vocab-to": "--vocab",
}
# Masks, positions and tables of angles that classes kept as buffers, and no longer read.
BUFFERS = (r".*\.(attn|attention)\.(bias|masked_bias)", r".*(inv_freq|position_ids)")
# The axis of heads inside a block that have no option of their own: it grows with the hidden size.
INNER = "inner_head"
# Words in lists of layer kinds that transformers itself reads as others.
OLDER_WORDS = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}
# Config fields of groups of experts, of which some are chosen first: a twin has one.
GROUPS = ("n_group", "num_expert_group")

# Flags of losses, heads for other tasks, initialisation, kernels and precision: they change nothing
# that a growth could.
IDLE = frozenset([
    "default_language",
    "_attn_implementation", "_name_or_path", "add_cross_attention", "apply_spec_augment",
    "architectures", "attention_softmax_in_fp32", "attn_implementation", "auto_map",
    "auxiliary_concat_input", "bos_token_id", "classifier_activation", "classifier_bias",
    "classifier_pooling", "ctc_loss_reduction", "ctc_zero_infinity", "decoder_start_token_id",
    "deterministic_flash_attn", "disable_ngram_loss", "dtype", "eos_token_id",
    "gradient_checkpointing", "id2label", "init_device", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "mamba_ssm_cache_dtype", "model_type",
    "moe_shared_expert_overlap", "name_or_path", "onnx_export", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type",
    "quantization_config", "rescale_prenorm_residual", "return_dict",
    "scale_attention_softmax_in_fp32", "sep_token_id", "slow_but_exact", "sparse_prediction",
    "summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "tf_legacy_loss", "time_step_init_scheme", "torch_dtype", "torchscript",
    "transformers_version", "use_associative_scan", "use_auxiliary_head", "use_bfloat16",
    "use_cache", "use_guided_attention_loss", "use_mamba_kernels", "use_mambapy",
    "use_mems_train",
])  # fmt: skip
# Functions of one number with f(0) = 0: what is proven with one of them holds with any other.
ACTIVATIONS = frozenset([
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python",
    "gelu_pytorch_tanh", "hardtanh", "leaky_relu", "mish", "quick_gelu", "relu", "relu2",
    "relu6", "silu", "swish", "tanh",
])  # fmt: skip


def evaluate(size: Sequence[Product], sizes: Mapping[str, int]) -> int:
    """A sum of products at these sizes."""
    total = 0
    for factor, *names in size:
        product = int(factor) * prod(sizes[name] for name in names if name[0] != "/")
        total += product // prod(sizes[name[1:]] for name in names if name[0] == "/")
    return total


def of_every_layer(value: Any) -> Any:
    """One number instead of a list that says it of every layer; anything else as it is."""
    alike = isinstance(value, list) and value and all(entry == value[0] for entry in value)
    return value[0] if alike and type(value[0]) is int else value


def width_name(axis: str) -> str:
    """What the width of heads that fill the hidden size is called among the sizes."""
    return "head_width" if axis == "query_head" else f"{axis}_width"


def layers_fed(config: Config) -> int:
    """First layers of a language model behind which features of images are added (Qwen3-VL), as
    the configs of its towers say."""
    for part in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        if isinstance(stated := part.get("deepstack_visual_indexes"), list):
            return len(stated)
        if part.get("deepstack_layer_map"):
            return sys.maxsize
    return 0


def is_word(value: Any, words: Collection[str]) -> bool:
    """A kind of layer is among these, by the name that it has today or had before."""
    return str(value) in words or OLDER_WORDS.get(str(value)) in words
