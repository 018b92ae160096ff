"""Caches are judged by their logits: what decodes otherwise than a forward pass fails."""

from __future__ import annotations

import json
import shutil
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import verify_models as models
from family_checkpoints import write_t5
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    T5ForConditionalGeneration,
)
from transformers.models.mistral import modeling_mistral

from growkit.core.errors import VerificationFailed
from growkit.verification import VerificationReport, model_inputs, verify_checkpoints


def compare(a: Path, b: Path, **options: Any) -> VerificationReport:
    return verify_checkpoints(
        a, b, **({"tokens": 32, "window": 32, "generate_tokens": 2} | options)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.make_model(), tmp_path_factory.mktemp("caches") / "a")


@pytest.fixture(scope="module")
def faulty(folder: Path) -> Path:
    """The same model; what a test breaks where the config says ``faulty`` is broken in it alone."""
    return marked(folder, folder.with_name("b"))


def marked(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"faulty": True}))
    return out


def patch_update(monkeypatch: pytest.MonkeyPatch, kind: type, change: Any) -> None:
    """``change(update, keys, values, layer)`` in the place of a cache's ``update``."""
    update = kind.update

    def changed(self: Any, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        return change(lambda k, v: update(self, k, v, layer, *args, **kwargs), keys, values, layer)

    monkeypatch.setattr(kind, "update", changed)


def drop_the_cache(monkeypatch: pytest.MonkeyPatch, kind: type, of: Any) -> None:
    """Layer 1, when it decodes with a cache of this kind, attends to the last token alone, where
    ``of(config)`` says so."""
    forward = modeling_mistral.MistralAttention.forward

    def forgetful(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        name = next((key for key, value in kwargs.items() if isinstance(value, kind)), None)
        if name and self.layer_idx == 1 and hidden_states.shape[1] == 1 and of(self.config):
            kwargs["attention_mask"] = kwargs[name] = None
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling_mistral.MistralAttention, "forward", forgetful)


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


def in_b(config: Any) -> bool:
    return bool(getattr(config, "faulty", False))


BOTH = pytest.mark.parametrize("kind", [DynamicCache, StaticCache])


@BOTH
@pytest.mark.parametrize("exactness", ["exact", "not-exact"])
def test_a_layer_that_drops_the_cache_fails(
    folder: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch, kind: type, exactness: str
) -> None:
    """One layer of three, and only when it decodes; whatever the growth promised."""
    drop_the_cache(monkeypatch, kind, in_b)
    report = compare(folder, faulty, exactness=exactness)
    assert report.passed is False
    name = "dynamic" if kind is DynamicCache else "static"
    assert f"{name} KV cache" in report.cause and "the first folder" not in report.cause
    assert [s.cache for s in report.cached if s.folder == "b" and not s.within] == [name]
    assert report.generation is not None
    assert report.generation.cached_equals_uncached is (kind is StaticCache)


@BOTH
@pytest.mark.parametrize("exactness", ["exact", "not-exact"])
def test_a_fault_of_the_class_is_no_fault_of_the_growth(
    folder: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch, kind: type, exactness: str
) -> None:
    """Both decode otherwise than they compute, and alike: the function is kept, and it is said."""
    drop_the_cache(monkeypatch, kind, lambda config: True)
    report = compare(folder, faulty, exactness=exactness)
    assert report.passed is (True if exactness == "exact" else None)
    name = "dynamic" if kind is DynamicCache else "static"
    off = [(s.folder, s.cache, s.as_in_a) for s in report.cached if not s.within]
    assert off == [("b", name, True), ("a", name, False)]
    note = next(note for note in report.notes if f"with a {name} cache is off" in note)
    assert "in both folders alike: MistralForCausalLM's own fault" in note
    assert report.generation is not None and report.generation.as_in_a is (kind is DynamicCache)
    assert report.generation.equals_a or exactness == "not-exact"
    assert "against A's own" in report.summary()


def test_faults_of_two_kinds_fail(
    folder: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A has a fault, and B decodes neither as it computes nor as A does."""
    drop_the_cache(monkeypatch, DynamicCache, lambda config: not in_b(config))
    forward = modeling_mistral.MistralAttention.forward

    def scaled(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        output, maps = forward(self, hidden_states, *args, **kwargs)
        decodes = hidden_states.shape[1] == 1 and in_b(self.config)
        return output * (2 if decodes else 1), maps

    monkeypatch.setattr(modeling_mistral.MistralAttention, "forward", scaled)
    report = compare(folder, faulty)
    assert report.passed is False
    assert "which decodes otherwise again" in report.cause
    assert not any("own fault" in note for note in report.notes)


@pytest.mark.parametrize("of", [in_b, lambda config: True], ids=["B", "both"])
def test_positions_that_are_off_by_one(
    folder: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch, of: Any
) -> None:
    forward = modeling_mistral.MistralModel.forward

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        ids = kwargs.get("input_ids")
        if cache is not None and cache.get_seq_length() and ids is not None and of(self.config):
            start = cache.get_seq_length() - 1
            kwargs["position_ids"] = torch.arange(start, start + ids.shape[1])[None]
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(modeling_mistral.MistralModel, "forward", shifted)
    report = compare(folder, faulty)
    assert report.passed is (of is not in_b)
    assert of is not in_b or "KV cache" in report.cause


def test_a_cache_that_raises_is_reported_with_its_error(
    folder: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, everywhere = modeling_mistral.MistralModel.forward, False

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if isinstance(cache, StaticCache) and (everywhere or in_b(self.config)):
            raise RuntimeError("no room")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(modeling_mistral.MistralModel, "forward", refuse)
    report = compare(folder, faulty)
    assert report.passed is False
    assert "static KV cache behind 28 tokens fails: no room" in report.cause
    everywhere = True
    report = compare(folder, faulty)
    assert report.passed is True
    assert [s.max_difference for s in report.cached if s.cache == "static"] == [None, None]
    assert any("with a static cache fails (no room)" in note for note in report.notes)


def test_a_class_that_cannot_generate(
    folder: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = modeling_mistral.MistralForCausalLM.generate
    of: Any = in_b

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if of(self.config):
            raise ValueError("no attention layers")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(modeling_mistral.MistralForCausalLM, "generate", refuse)
    with pytest.raises(VerificationFailed, match="no attention layers"):
        compare(folder, faulty)
    of = lambda config: True  # noqa: E731
    report = compare(folder, faulty)
    assert report.passed is True and report.generation is None
    assert any("generation not compared" in note for note in report.notes)


def test_a_class_without_a_static_cache_is_said_to_have_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_mistral.MistralForCausalLM, "_can_compile_fullgraph", False)
    report = compare(folder, folder)
    assert report.passed is True
    assert {s.cache for s in report.cached} == {"dynamic"}
    assert any("does not support one" in note for note in report.notes)
    assert "static" not in report.compared


@BOTH
def test_encoder_decoders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    a = write_t5(tmp_path / "a")
    b = marked(a, tmp_path / "b")
    report = compare(a, b, window=64)
    assert report.passed is True, report.cause
    assert len(report.cached) == 2
    running: Any = None
    forward = T5ForConditionalGeneration.forward

    @wraps(forward)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal running
        running = self.config
        return forward(self, *args, **kwargs)

    def shift(update: Any, keys: Any, values: Any, layer: int) -> Any:
        keys, values = update(keys, values)
        return (keys, values.roll(1, dims=2)) if in_b(running) else (keys, values)

    monkeypatch.setattr(T5ForConditionalGeneration, "forward", watched)
    patch_update(monkeypatch, kind, shift)
    assert compare(a, b, window=64).passed is False


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
    notes = compare(tmp_path, tmp_path).notes
    assert any("in both folders alike" in note for note in notes)


def test_a_class_without_a_cache_is_compared_without_one(tmp_path: Path) -> None:
    config = AutoConfig.for_model("openai-gpt", n_embd=32, n_layer=2, n_head=4, vocab_size=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    report = compare(tmp_path, tmp_path)
    assert report.passed is True and not report.cached
