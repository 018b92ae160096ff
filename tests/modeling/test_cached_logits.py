"""Logits of a prefill and of single cached steps are those of one pass over the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gda_cases import FORM_IDS, FORMS
from test_modeling_gda import make as gda_model
from test_modeling_growkit_t5 import KINDS, SOURCE, TARGET
from test_modeling_growkit_t5 import model_of as t5_of
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from variant_cases import CASES, model_of, tokens

from growkit.variants.gda import attention as gda
from growkit.variants.shared import layer_keywords, one_call
from growkit.variants.shared.layer_keywords import LAYERS_WRITE_EVERY_CACHE, take_cache
from growkit.variants.wgqa_t5 import attention as wgqa_t5

PREFILL, LENGTH = 4, 9
CACHE = "cache" if LAYERS_WRITE_EVERY_CACHE else "past_key_values"  # as this transformers says
EVERY = [*(f"gda-{name}" for name in FORM_IDS), *CASES]


def decoder(name: str, **fields: Any) -> Any:
    if name in CASES:
        return model_of(name, **fields)
    return gda_model(*FORMS[FORM_IDS.index(name.removeprefix("gda-"))], **fields)


def cache_of(kind: str, model: Any) -> Any:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=LENGTH + 3)


@torch.no_grad()
def error_of_cached_steps(model: Any, cache: Any, keyword: str = CACHE) -> float:
    """Largest difference to the logits of one full pass, which has no cache."""
    ids = tokens(length=LENGTH)
    full = model(ids, use_cache=False).logits
    given: dict[str, Any] = {keyword: cache, "use_cache": True}
    parts = [model(ids[:, :PREFILL], **given).logits]
    parts += [model(ids[:, i : i + 1], **given).logits for i in range(PREFILL, LENGTH)]
    return float((torch.cat(parts, 1) - full).abs().max())


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", EVERY)
def test_cached_logits_equal_a_full_forward(name: str, kind: str) -> None:
    model = decoder(name).double()
    assert error_of_cached_steps(model, cache_of(kind, model)) < 1e-6  # lambda stays in float32


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", KINDS)
def test_cached_logits_of_t5_equal_a_full_forward(name: str, kind: str) -> None:
    model = t5_of(name).double()
    assert t5_error(model, kind) < 1e-6


@torch.no_grad()
def t5_error(model: Any, kind: str) -> float:
    full = model(input_ids=SOURCE, decoder_input_ids=TARGET, use_cache=False).logits
    encoded = model.encoder(input_ids=SOURCE)
    if kind == "dynamic":
        caches = [DynamicCache(), DynamicCache()]
    else:
        decoder_config = model.decoder.config
        caches = [
            StaticCache(config=decoder_config, max_cache_len=length)
            for length in (TARGET.shape[1] + 2, SOURCE.shape[1])
        ]
    given = {CACHE: EncoderDecoderCache(*caches), "use_cache": True, "encoder_outputs": encoded}
    steps = [TARGET[:, :3], *TARGET[:, 3:].split(1, dim=1)]
    parts = [model(decoder_input_ids=step, **given).logits for step in steps]
    return float((torch.cat(parts, 1) - full).abs().max())


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_control_a_layer_that_drops_its_cache_is_seen(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dropping(kwargs: dict[str, Any], implementation: str) -> None:
        take_cache(kwargs, implementation)

    for module in (gda, one_call, wgqa_t5):
        monkeypatch.setattr(module, "take_cache", dropping)
    for name in ("gda-own-norm", "gqa"):
        model = decoder(name).double()
        with_error = error_of_cached_steps
        try:
            assert with_error(model, cache_of(kind, model)) > 1e-3
        except RuntimeError:  # the mask of a static cache has its length
            assert kind == "static"


def test_the_name_of_older_transformers_is_taken_too() -> None:
    model = decoder("gqa").double()
    cache = cache_of("dynamic", model)
    assert error_of_cached_steps(model, cache, "past_key_values") < 1e-6


@pytest.mark.parametrize("name", ["gda-own-norm", "gda-shared-plain", "gqa", "diff_v1", "sas"])
def test_training_with_and_without_gradient_checkpointing(name: str) -> None:
    """use_cache is on by default: the cache is made, and handed on or taken away."""
    gradients: list[Tensor] = []
    for checkpointing in (False, True):
        model = decoder(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["gda-own-norm", "gda-shared-norm", "gqa", "wgqa", "sas"])
def test_an_unknown_keyword_raises(name: str) -> None:
    model = decoder(name)
    with pytest.raises(TypeError, match=r"\['memory'\]"):
        model(tokens(), memory=torch.ones(1))
    with pytest.raises(TypeError, match=r"\['memory'\]"):
        t5_of("gqa")(input_ids=SOURCE, decoder_input_ids=TARGET, memory=torch.ones(1))


def test_an_engine_hands_its_own_keywords_through() -> None:
    kwargs: dict[str, Any] = {"attention_instances": {}}
    assert take_cache(kwargs, "vllm") is None and kwargs
    with pytest.raises(TypeError, match="two caches"):
        take_cache({"cache": DynamicCache(), "past_key_values": DynamicCache()}, "sdpa")


class Paged:
    """Stands for the cache of continuous batching: not a Cache, it writes into the keywords."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        kwargs["is_causal"] = True
        return key * 2, value * 2


@pytest.mark.parametrize("layers_write", [False, True])
def test_a_paged_cache_is_told_by_what_it_is(
    layers_write: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_keywords, "LAYERS_WRITE_EVERY_CACHE", layers_write)
    key = value = torch.ones(1)
    for keyword in ("cache", "past_key_values"):
        kwargs: dict[str, Any] = {keyword: Paged()}
        cache = take_cache(kwargs, "sdpa")
        written = layer_keywords.write_cache(cache, key, value, 0, kwargs)
        if layers_write:
            assert kwargs == {"is_causal": True} and written[0] == 2
        else:
            assert list(kwargs) == ["cache"] and written[0] == 1
        assert layer_keywords.written_by_attention(cache, {}) is not layers_write
        assert layer_keywords.written_by_attention(cache, {"block_table": torch.ones(1)})
    assert not layer_keywords.written_by_attention(DynamicCache(), {"block_table": 1})
