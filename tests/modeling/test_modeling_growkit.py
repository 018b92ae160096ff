"""GrowkitForCausalLM does what a user of transformers expects, whatever its attention is."""

from __future__ import annotations

import functools

import pytest
import torch
from flex_backend import needs_compiler, uncompiled
from gda_cases import gda_config, scatter_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from test_modeling_gda import gradients, greedy, left_padded
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from variant_cases import CASES, config_of, model_of, tokens

from growkit.families.lambda_schedule import LAMBDA_ROLES
from growkit.modeling import GdaForCausalLM, GrowkitForCausalLM, GrowkitModel
from growkit.variants.sas.attention import HeadSimulation

EVERY_CASE = pytest.mark.parametrize("case", CASES)


@EVERY_CASE
def test_model_equals_the_model_of_definitions(case):
    """Whole model, left padding included, with every attention layer replaced by the oracle."""
    model = model_of(case, "eager")
    ids, mask = left_padded([[5, 9, 3, 8, 7], [4, 2, 6]])
    actual = model(ids, attention_mask=mask).logits

    def reference(layer, hidden_states, position_embeddings, attention_mask, **kwargs):
        output = layer.reference(layer, hidden_states, position_embeddings, attention_mask)
        return output, None

    for layer in model.model.layers:
        layer.self_attn.forward = functools.partial(reference, layer.self_attn)
    expected = model(ids, attention_mask=mask).logits
    assert (actual - expected)[mask == 1].abs().max() < 2e-5


@functools.cache
def shared_model(case, implementation):
    return model_of(case, implementation)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.integers(1, 60), min_size=2, max_size=12),
    at=st.integers(0, 11),
    token=st.integers(1, 60),
    implementation=st.sampled_from(["eager", "sdpa"]),
)
@EVERY_CASE
@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_output(case, ids, at, token, implementation):
    model = shared_model(case, implementation)
    at %= len(ids)
    changed = [*ids[:at], token, *ids[at + 1 :]]
    before, after = (model(torch.tensor([row])).logits for row in (ids, changed))
    assert torch.allclose(before[:, :at], after[:, :at], atol=1e-6)
    if changed != ids:
        assert (before[:, at:] - after[:, at:]).abs().max() > 1e-3


@torch.no_grad()
def test_control_a_simulation_that_mixes_tokens_is_seen(monkeypatch):
    """Each token reads its successor too."""
    model, simulate = model_of("sas"), HeadSimulation.forward

    def mixed(self, states):
        return simulate(self, states) + simulate(self, states.roll(-1, dims=2))

    ids = tokens(1, 8)
    changed = ids.clone()
    changed[0, 6] = ids[0, 6] % 60 + 1
    assert torch.allclose(model(ids).logits[:, :6], model(changed).logits[:, :6], atol=1e-6)
    monkeypatch.setattr(HeadSimulation, "forward", mixed)
    assert (model(ids).logits[:, :6] - model(changed).logits[:, :6]).abs().max() > 1e-3


@EVERY_CASE
@torch.no_grad()
def test_flex_attention_hides_left_padding_as_eager_does(case):
    """By the block mask that transformers makes; uncompiled. Gradients: tests/attention."""
    model = model_of(case, "eager")
    ids, mask = left_padded([[5, 9, 3, 8, 7], [4, 2, 6]])
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("flex_attention")
    with uncompiled():
        actual = model(ids, attention_mask=mask).logits
        ignored = model(ids).logits
    assert (actual - expected)[mask == 1].abs().max() < 2e-5
    assert (ignored - expected)[mask == 1].abs().max() > 1e-2, "padding would not be noticed"


@needs_compiler
def test_compiled_flex_attention_computes_the_same():
    model = model_of("diff_v2", num_hidden_layers=1)
    ids, mask = left_padded([[5, 9, 3, 8, 7], [4, 2, 6]])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("flex_attention")
        actual = model(ids, attention_mask=mask).logits
    assert (actual - expected)[mask == 1].abs().max() < 2e-5


@EVERY_CASE
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cache_changes_no_token(case, cache):
    model = model_of(case)
    options = (
        {"cache_implementation": "static", "disable_compile": True} if cache != "dynamic" else {}
    )
    plain = greedy(model, tokens(), use_cache=False)
    assert torch.equal(greedy(model, tokens(), **options), plain)
    assert len(set(plain[0, 9:].tolist())) > 1, "one token again and again shows nothing"


@EVERY_CASE
def test_left_padded_batch_generates_what_each_sequence_does(case):
    model = model_of(case)
    sequences = [[5, 9, 3, 8, 7, 11], [4, 2, 6], [33]]
    ids, mask = left_padded(sequences)
    batch = greedy(model, ids, attention_mask=mask)[:, ids.shape[1] :]
    for row, sequence in enumerate(sequences):
        alone = greedy(model, torch.tensor([sequence]))[0, len(sequence) :]
        assert torch.equal(batch[row], alone)
    ignored = greedy(model, ids, attention_mask=torch.ones_like(mask))[:, ids.shape[1] :]
    assert not torch.equal(ignored, batch), "padding would not be noticed"


@EVERY_CASE
def test_packed_documents_do_not_see_each_other(case):
    model = model_of(case)
    first, second = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    both = torch.cat([first, second], 1)
    packed = model(both, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(first).logits, model(second).logits], 1)
    assert (packed - apart).abs().max() < 1e-5
    leaking = model(both, use_cache=False).logits
    assert (leaking - apart).abs().max() > 1e-2


@EVERY_CASE
def test_gradient_checkpointing_changes_no_gradient(case):
    model = model_of(case).train()
    expected = gradients(model)
    calls = []
    model.gradient_checkpointing_enable()
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    actual = gradients(model)
    assert len(calls) == 2, "the layer is computed again in the backward pass"
    assert all(torch.allclose(actual[name], expected[name], atol=1e-6) for name in expected)


@EVERY_CASE
def test_a_fresh_model_trains_every_parameter(case):
    """Start values: nothing is zero for ever, and a step along the gradient lowers the loss."""
    torch.manual_seed(0)
    model = GrowkitForCausalLM(config_of(case, "sdpa"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(8):
        loss = model(tokens(), labels=tokens()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    still = [name for name, p in model.named_parameters() if torch.equal(p, start[name])]
    assert not still


@EVERY_CASE
def test_bf16_runs_close_to_fp32(case, tmp_path):
    model = model_of(case)
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    half = GrowkitForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        vector = name.rsplit(".", 1)[-1] in LAMBDA_ROLES
        assert parameter.dtype == (torch.float32 if vector else torch.bfloat16), name
    logits = half(tokens()).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    loss = half(tokens(), labels=tokens()).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters())


@EVERY_CASE
def test_auto_classes_know_the_model(case, tmp_path):
    model = model_of(case, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attention == model.config.attention
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is GrowkitForCausalLM
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is GrowkitModel


def renamed_sizes(config):
    return {
        name: getattr(config, name)
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
            *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_parameters"),
        )
    }


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize(
    ("config_class", "model_class", "fields"),
    [
        (LlamaConfig, LlamaForCausalLM, {}),
        (Qwen3Config, Qwen3ForCausalLM, {"qk_norm": True}),
    ],
    ids=["llama", "qwen3"],
)
def test_gqa_is_the_attention_of_ordinary_models_name_for_name(
    config_class, model_class, fields, kv
):
    ours = model_of("mha", num_key_value_heads=kv, **fields)
    theirs = model_class(config_class(**renamed_sizes(ours.config))).eval()
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(theirs(tokens()).logits, ours(tokens()).logits, atol=1e-5)


def test_diff_v1_is_gda_at_one_to_one_name_for_name():
    ours = model_of("diff_v1")
    theirs = scatter_weights(GdaForCausalLM(gda_config((4, 4, 2), lambda_init=[0.3, 0.4])))
    theirs.load_state_dict(ours.state_dict())
    config = config_of("diff_v1", lambda_init=[0.3, 0.4])
    ours = GrowkitForCausalLM(config)
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(theirs(tokens()).logits, ours(tokens()).logits, atol=1e-5)


def test_diff_v2_is_gated_gda_at_one_to_one_name_for_name():
    ours = model_of("diff_v2")
    gated = model_of("gda_gated", num_noise_heads=4)
    gated.load_state_dict(ours.state_dict())
    assert torch.equal(gated(tokens()).logits, ours(tokens()).logits)
