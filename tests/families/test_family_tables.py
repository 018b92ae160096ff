"""The tables against tensors listed by hand and against the models that transformers makes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import growkit.modeling  # noqa: F401  (registers the gda model)
from growkit.core.errors import CheckpointError, UsageError
from growkit.families import family_of
from growkit.families.differential import check_head_counts, signal_to_noise

CONFIGS: dict[str, tiny.Config] = {
    "gda": tiny.gda_config(6, 2, 1),
    "gda-1:2": tiny.gda_config(2, 4, 2, hidden_act="poly_norm", tie_word_embeddings=True),
    "gda-plain": tiny.gda_config(4, 2, 2, own=False, sub_layer_norm=False),
    "gda-plain-norm": tiny.gda_config(4, 2, 2, own=False),
    "motif": tiny.motif_config(),
    "motif-2": tiny.motif_config(8, 2, 2),
    "diffllama": tiny.diffllama_config(8, 4),
    "llama": tiny.llama_config(4, 1, tie_word_embeddings=True),
    "llama-bias": tiny.llama_config(attention_bias=True, mlp_bias=True),
}


def declared(config: tiny.Config) -> dict[str, tuple[int, ...]]:
    family = family_of(config)
    sizes = family.sizes(config)
    return {name: tensor.shape(sizes) for tensor, _, name in family.names(sizes)}


@pytest.mark.parametrize("case", CONFIGS)
def test_tables_list_every_tensor(case: str) -> None:
    assert declared(CONFIGS[case]) == tiny.shapes(CONFIGS[case])


@pytest.mark.parametrize("case", [c for c in CONFIGS if not c.startswith("motif")])
def test_transformers_makes_the_same_tensors(case: str) -> None:
    values = {k: v for k, v in CONFIGS[case].items() if k not in ("model_type", "architectures")}
    config = AutoConfig.for_model(CONFIGS[case]["model_type"], **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    made = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert declared(CONFIGS[case]) == made


@pytest.mark.parametrize("case", CONFIGS)
def test_sizes_and_fields_are_inverse(case: str) -> None:
    config = CONFIGS[case]
    family = family_of(config)
    sizes = family.sizes(config)
    assert family.sizes({**config, **family.config_fields(sizes)}) == sizes


def test_an_unknown_model_type_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'diffllama'"):
        family_of({"model_type": "difflama"})
    for config in ({}, {"model_type": None}, {"model_type": 3}):
        with pytest.raises(UsageError, match=r"Known model types: .*gda"):
            family_of(config)


@pytest.mark.parametrize("model_type", ["qwen3_6", "qwen4", "gpt5", "llama_vision", "t6"])
def test_another_version_or_another_model_is_no_misspelling(model_type: str) -> None:
    with pytest.raises(UsageError, match="`growkit derive` makes a table") as caught:
        family_of({"model_type": model_type})
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 0, -1, 2.0, "16", True])
def test_sizes_have_to_be_positive_whole_numbers(value: Any) -> None:
    config = tiny.gda_config() | {"head_dim": value}
    with pytest.raises(UsageError, match="head_dim"):
        family_of(config).sizes(config)


def test_tensors_that_hold_nothing_are_allowed_and_others_are_not() -> None:
    config = CONFIGS["llama"]
    family = family_of(config)
    sizes, shapes = family.sizes(config), tiny.shapes(config)
    family.check_tensors(shapes | {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}, sizes)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias.* is not part of"):
        family.check_tensors(shapes | {"model.layers.0.self_attn.q_proj.bias": (16,)}, sizes)


@given(st.integers(-1, 12), st.integers(-1, 12), st.integers(1, 4))
def test_head_counts_that_pass_can_be_linked(signal: int, noise: int, kv: int) -> None:
    fits = (
        min(signal, noise) >= 1
        and not max(signal, noise) % min(signal, noise)
        and not signal % kv
        and not noise % kv
    )
    if not fits:
        with pytest.raises(UsageError):
            check_head_counts(signal, noise, kv)
        return
    check_head_counts(signal, noise, kv)
    links = signal_to_noise({"signal_head": signal, "noise_head": noise})
    assert links.shape == (signal, max(1, noise // signal))
    for head in range(signal):
        expected = (
            [head * noise // signal]
            if signal >= noise
            else list(range(head * noise // signal, (head + 1) * noise // signal))
        )
        assert links[head].tolist() == expected
