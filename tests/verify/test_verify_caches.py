"""Caches are judged by their logits: what decodes otherwise than a forward pass fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import verify_models as models
from family_checkpoints import write_t5
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.mistral import modeling_mistral

from growkit.verification import VerificationReport, model_inputs, verify_checkpoints


def compare(a: Path, b: Path, **options: Any) -> VerificationReport:
    return verify_checkpoints(
        a, b, **({"tokens": 32, "window": 32, "generate_tokens": 2} | options)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.make_model(), tmp_path_factory.mktemp("caches") / "a")


def patch_update(monkeypatch: pytest.MonkeyPatch, kind: type, change: Any) -> None:
    """``change(update, cache, keys, values, layer)`` in the place of a cache's ``update``."""
    update = kind.update

    def changed(self: Any, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        return change(lambda k, v: update(self, k, v, layer, *args, **kwargs), keys, values, layer)

    monkeypatch.setattr(kind, "update", changed)


def test_both_caches_are_compared(folder: Path) -> None:
    report = compare(folder, folder)
    assert report.passed is True
    assert [(s.folder, s.cache) for s in report.cached] == [("b", "dynamic"), ("b", "static")]
    for steps in report.cached:
        assert steps.within and steps.max_difference is not None
        assert (steps.prefill_tokens, steps.steps) == (28, 4)
        assert steps.max_difference < steps.tolerance / 3
    assert report.generation is not None
    assert report.generation.max_cache_difference < report.generation.cache_tolerance / 3
    assert "dynamic and static cache behind 28 tokens" in report.compared


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_layer_that_drops_the_cache_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    """One layer of three, and only when it decodes: the class's fault, in both folders."""

    def drop(update: Any, keys: Any, values: Any, layer: int) -> Any:
        cached = update(keys, values)
        return (keys, values) if layer == 1 and keys.shape[2] == 1 else cached

    patch_update(monkeypatch, kind, drop)
    # Attention wants masks as long as the keys.
    attention = modeling_mistral.MistralAttention.forward

    def short_mask(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        cached = isinstance(kwargs.get("past_key_values"), kind)
        if cached and self.layer_idx == 1 and hidden_states.shape[1] == 1:
            kwargs["attention_mask"] = None
        return attention(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling_mistral.MistralAttention, "forward", short_mask)
    report = compare(folder, folder, exactness="not-exact")
    assert report.passed is False
    name = "dynamic" if kind is DynamicCache else "static"
    assert f"{name} KV cache" in report.cause
    assert "so it does in the first folder" in report.cause
    assert [s.cache for s in report.cached if not s.within] == [name, name]


def test_positions_that_are_off_by_one_fail(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    length = DynamicCache.get_seq_length

    def later(self: Any, *args: Any, **kwargs: Any) -> int:
        return length(self, *args, **kwargs) - 1 if length(self, *args, **kwargs) else 0

    forward = modeling_mistral.MistralModel.forward

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        ids = kwargs.get("input_ids")
        if cache is not None and length(cache) and ids is not None:
            start = later(cache)
            kwargs["position_ids"] = torch.arange(start, start + ids.shape[1])[None]
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(modeling_mistral.MistralModel, "forward", shifted)
    report = compare(folder, folder)
    assert report.passed is False
    assert "KV cache" in report.cause


def test_a_cache_that_raises_is_reported_with_its_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(update: Any, keys: Any, values: Any, layer: int) -> Any:
        raise RuntimeError("no room")

    patch_update(monkeypatch, StaticCache, refuse)
    report = compare(folder, folder)
    assert report.passed is False
    assert "static KV cache behind 28 tokens fails: no room" in report.cause
    assert [s.max_difference for s in report.cached if s.cache == "static"] == [None, None]


def test_a_class_without_a_static_cache_is_said_to_have_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_mistral.MistralForCausalLM, "_can_compile_fullgraph", False)
    report = compare(folder, folder)
    assert report.passed is True
    assert {s.cache for s in report.cached} == {"dynamic"}
    assert any("does not support one" in note for note in report.notes)
    assert "static" not in report.compared


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_encoder_decoders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    a = write_t5(tmp_path / "a")
    report = compare(a, a, window=64)
    assert report.passed is True, report.cause
    assert len(report.cached) == 2

    def shift(update: Any, keys: Any, values: Any, layer: int) -> Any:
        keys, values = update(keys, values)
        return keys, values.roll(1, dims=2)

    patch_update(monkeypatch, kind, shift)
    assert compare(a, a, window=64).passed is False


OWN_CACHES = {
    "minimax": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "block_size": 8,
        "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
}  # fmt: skip


@pytest.mark.parametrize("kind", OWN_CACHES)
def test_a_class_with_a_cache_of_its_own_kind_begins_it_itself(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes none of transformers' caches, or leaves one unread."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 256}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes, **OWN_CACHES[kind])
    )
    model.save_pretrained(tmp_path)
    report = compare(tmp_path, tmp_path)
    assert report.passed is True
    assert [s.cache for s in report.cached] == ["dynamic"]
    assert report.cached[0].steps == 4 and report.cached[0].max_difference is not None
    # Control: given transformers' cache it decodes something else, or not at all.
    monkeypatch.setattr(model_inputs, "own_cache_keyword", lambda model: None)
    monkeypatch.setattr(model_inputs, "takes_cache", lambda model: True)
    assert compare(tmp_path, tmp_path).passed is False


def test_a_class_without_a_cache_is_compared_without_one(tmp_path: Path) -> None:
    config = AutoConfig.for_model("openai-gpt", n_embd=32, n_layer=2, n_head=4, vocab_size=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    report = compare(tmp_path, tmp_path)
    assert report.passed is True and not report.cached
