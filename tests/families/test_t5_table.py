"""T5's table against the class that it describes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from family_checkpoints import T5_KINDS, T5_SIZES, class_config
from transformers import AutoModelForSeq2SeqLM

from growkit.core.errors import CheckpointError, UsageError
from growkit.families import family_of
from growkit.families.t5 import T5


def class_shapes(config: dict[str, Any], own_head: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the class stores, without allocating it."""
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(class_config(config))
    names = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    tied = set(model.all_tied_weights_keys) - ({"lm_head.weight"} if own_head else set())
    return {name: shape for name, shape in names.items() if name not in tied}


def declared(config: dict[str, Any], names: Any) -> list[tuple[str, tuple[int, ...]]]:
    sizes = T5.sizes_of(config, names)
    return [(name, tensor.shape(sizes)) for tensor, _, name in T5.names(sizes)]


@pytest.mark.parametrize("layers", [(1, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("kind", T5_KINDS)
def test_every_parameter_is_declared_once(kind: str, layers: tuple[int, int]) -> None:
    fields, own_head = T5_KINDS[kind]
    config = (
        T5_SIZES | fields | dict(zip(("num_layers", "num_decoder_layers"), layers, strict=True))
    )
    shapes = class_shapes(config, own_head)
    found = declared(config, shapes)
    assert not [name for name, count in Counter(n for n, _ in found).items() if count > 1]
    assert dict(found) == shapes


def test_silent_fields_mean_what_the_class_means() -> None:
    assert dict(declared({"model_type": "t5"}, ())) == class_shapes({"model_type": "t5"}, False)
    fewer = {"model_type": "t5", "num_layers": 2, "num_decoder_layers": None}
    assert T5.sizes(fewer)["decoder_layer"] == 2


@pytest.mark.parametrize(
    ("config", "scaled"),
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        # What transformers 5 writes for both of the latter.
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": True}, True),
    ],
)
def test_who_divides_the_last_hidden_state(config: dict[str, Any], scaled: bool) -> None:
    config = T5_SIZES | config
    assert class_config(config).scale_decoder_outputs is scaled
    assert T5.sqrt_head_divisor(T5.sizes(config)) is scaled


def test_a_table_that_lacks_or_invents_a_tensor_is_caught() -> None:
    config = T5_SIZES | T5_KINDS["v1.1"][0]
    shapes = class_shapes(config, True)
    sizes = T5.sizes_of(config, shapes)
    T5.check_tensors(shapes, sizes)
    for tensor in T5.tensors:
        if not tensor.when(sizes):
            continue
        lacking = replace(T5, tensors=tuple(t for t in T5.tensors if t is not tensor))
        with pytest.raises(CheckpointError, match=re.escape(tensor.name.replace("{layer}", "0"))):
            lacking.check_tensors(shapes, sizes)


def test_names_that_stand_for_the_shared_embedding() -> None:
    """Early checkpoints store them, and a position bias that the class never reads."""
    shapes = class_shapes(T5_SIZES, False)
    stored = shapes | {
        "encoder.embed_tokens.weight": (256, 32),
        "decoder.embed_tokens.weight": (256, 32),
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (8, 4),
    }
    T5.check_tensors(stored, T5.sizes_of(T5_SIZES, stored))
    with pytest.raises(CheckpointError, match=r"encoder\.embed_tokens"):
        T5.check_tensors(stored | {"encoder.embed_tokens.weight": (256, 8)}, T5.sizes(T5_SIZES))


def test_sizes_have_to_be_positive_whole_numbers() -> None:
    for field in ("d_model", "num_heads", "d_kv", "num_layers", "num_decoder_layers"):
        with pytest.raises(UsageError, match=field):
            family_of(T5_SIZES).sizes(T5_SIZES | {field: 0})
