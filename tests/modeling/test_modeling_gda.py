"""GdaForCausalLM does what a user of transformers expects of a language model."""

from __future__ import annotations

import functools

import pytest
import torch
from flex_backend import needs_compiler
from gda_cases import FORM_IDS, FORMS, HEADS, gda_config, scatter_weights
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from growkit.families.lambda_schedule import LAMBDA_ROLES
from growkit.modeling import GdaForCausalLM, GdaModel
from growkit.variants.gda.attention import gda_attention_reference

KEYS = pytest.mark.parametrize("noise_keys", ["own", "shared"])
EVERY_FORM = pytest.mark.parametrize(("noise_keys", "norm"), FORMS, ids=FORM_IDS)


def make(noise_keys="own", norm=True, heads=HEADS["3:1"], implementation="sdpa", **fields):
    config = gda_config(heads, noise_keys, norm, implementation, **fields)
    return scatter_weights(GdaForCausalLM(config)).eval()


def tokens(batch=2, length=9, seed=5):
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(sequences, pad=0):
    width = max(len(s) for s in sequences)
    ids = torch.tensor([[pad] * (width - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask


def greedy(model, ids, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, **options)


@EVERY_FORM
def test_model_equals_the_model_of_definitions(noise_keys, norm):
    """Whole model, left padding included, with every attention layer replaced by the oracle."""
    model = make(noise_keys, norm, implementation="eager")
    ids, mask = left_padded([[5, 9, 3, 8, 7], [4, 2, 6]])
    actual = model(ids, attention_mask=mask).logits

    def reference(layer, hidden_states, position_embeddings, attention_mask, **kwargs):
        output = gda_attention_reference(layer, hidden_states, position_embeddings, attention_mask)
        return output, None

    for layer in model.model.layers:
        layer.self_attn.forward = functools.partial(reference, layer.self_attn)
    expected = model(ids, attention_mask=mask).logits
    assert (actual - expected)[mask == 1].abs().max() < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@EVERY_FORM
def test_a_later_token_never_changes_an_earlier_output(noise_keys, norm, implementation):
    model = make(noise_keys, norm, implementation=implementation)
    ids = tokens(1, 10)
    before = model(ids).logits
    ids[0, 6] = ids[0, 6] % 60 + 1
    after = model(ids).logits
    assert torch.allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert (before[:, 6:] - after[:, 6:]).abs().amax(-1).min() > 1e-3


@needs_compiler
@KEYS
def test_flex_attention_computes_the_same(noise_keys):
    """Forward only: on the CPU torch has no backward pass for it."""
    model = make(noise_keys, num_hidden_layers=1)
    ids, mask = left_padded([[5, 9, 3, 8, 7], [4, 2, 6]])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("flex_attention")
        actual = model(ids, attention_mask=mask).logits
    assert (actual - expected)[mask == 1].abs().max() < 2e-5


@EVERY_FORM
def test_cache_changes_no_token(noise_keys, norm):
    model = make(noise_keys, norm)
    assert torch.equal(greedy(model, tokens()), greedy(model, tokens(), use_cache=False))


@EVERY_FORM
def test_static_cache_changes_no_token(noise_keys, norm):
    model = make(noise_keys, norm)
    static = greedy(model, tokens(), cache_implementation="static", disable_compile=True)
    assert torch.equal(static, greedy(model, tokens(), use_cache=False))


@EVERY_FORM
def test_left_padded_batch_generates_what_each_sequence_does(noise_keys, norm):
    model = make(noise_keys, norm)
    sequences = [[5, 9, 3, 8, 7, 11], [4, 2, 6], [33]]
    ids, mask = left_padded(sequences)
    batch = greedy(model, ids, attention_mask=mask)[:, ids.shape[1] :]
    for row, sequence in enumerate(sequences):
        alone = greedy(model, torch.tensor([sequence]))[0, len(sequence) :]
        assert torch.equal(batch[row], alone)
    ignored = greedy(model, ids, attention_mask=torch.ones_like(mask))[:, ids.shape[1] :]
    assert not torch.equal(ignored, batch), "padding would not be noticed"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@KEYS
def test_packed_documents_do_not_see_each_other(noise_keys, implementation):
    model = make(noise_keys, implementation=implementation)
    first, second = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    both = torch.cat([first, second], 1)
    packed = model(both, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(first).logits, model(second).logits], 1)
    assert (packed - apart).abs().max() < 1e-5
    leaking = model(both, use_cache=False).logits
    assert (leaking - apart).abs().max() > 1e-2


def gradients(model):
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@KEYS
def test_gradient_checkpointing_changes_no_gradient(noise_keys):
    model = make(noise_keys).train()
    expected = gradients(model)
    calls = []
    model.gradient_checkpointing_enable()
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    actual = gradients(model)
    assert len(calls) == 2, "the layer is computed again in the backward pass"
    assert all(torch.allclose(actual[name], expected[name], atol=1e-6) for name in expected)


@KEYS
def test_compiles_into_one_graph(noise_keys):
    model = make(noise_keys, num_hidden_layers=1)
    expected = gradients(model)
    logits = model(tokens()).logits
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(tokens(), labels=tokens())
    assert torch.allclose(out.logits, logits, atol=1e-5)
    out.loss.backward()
    assert all(
        torch.allclose(p.grad, expected[name], atol=1e-5) for name, p in model.named_parameters()
    )


@EVERY_FORM
def test_bf16_runs_close_to_fp32_with_lambda_in_fp32(noise_keys, norm, tmp_path):
    model = make(noise_keys, norm)
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    half = GdaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in half.named_parameters()}
    for name, dtype in dtypes.items():
        vector = name.rsplit(".", 1)[-1] in LAMBDA_ROLES
        assert dtype == (torch.float32 if vector else torch.bfloat16), name
    logits = half(tokens()).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert torch.isfinite(half(tokens(), labels=tokens()).loss)
    half.save_pretrained(tmp_path / "again")
    again = GdaForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert {name: p.dtype for name, p in again.named_parameters()} == dtypes


def test_tied_embeddings_stay_one_tensor(tmp_path):
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded, report = GdaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    loaded.resize_token_embeddings(70)
    assert loaded(tokens()).logits.shape[-1] == 70


@KEYS
def test_hidden_states_are_the_residual_stream_and_attentions_the_maps(noise_keys):
    model = make(noise_keys, implementation="eager", num_hidden_layers=3)
    out = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(tokens()))
    stream = []
    model.model.layers[1].register_forward_hook(lambda m, args, output: stream.append(output))
    model(tokens())
    assert torch.equal(out.hidden_states[2], stream[0])
    assert len(out.attentions) == 3
    assert out.attentions[0].shape == (2, 8, 9, 9)  # every head's softmax, signal and noise
    assert torch.allclose(out.attentions[0].sum(-1), torch.ones(2, 8, 9), atol=1e-5)


def test_loss_is_the_shifted_cross_entropy():
    model = make()
    ids = tokens()
    labels = ids.clone()
    labels[:, :3] = -100
    out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, 2:-1].flatten(0, 1), ids[:, 3:].flatten()
    )
    assert torch.allclose(out.loss, expected, atol=1e-6)
    averaged = model(ids, labels=labels, num_items_in_batch=24).loss  # what Trainer passes
    assert torch.allclose(averaged, expected * 12 / 24, atol=1e-6)


def test_fresh_weights_have_the_configured_spread():
    config = gda_config(
        hidden_size=128, head_dim=64, vocab_size=500, hidden_act="poly_norm", lambda_std=0.1
    )
    torch.manual_seed(0)
    model = GdaForCausalLM(config)
    layer = model.model.layers[0]
    for weight in (model.lm_head.weight, layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    vectors = [getattr(m.self_attn, n) for m in model.model.layers for n in LAMBDA_ROLES]
    assert torch.cat(vectors).std().item() == pytest.approx(0.1, rel=0.15)
    assert torch.equal(layer.self_attn.subln.weight, torch.ones(128))
    assert torch.allclose(layer.mlp.act_fn.weight, torch.full((3,), 1 / 3))
    assert torch.equal(layer.mlp.act_fn.bias, torch.zeros(1))


def test_auto_classes_know_the_model(tmp_path):
    model = make(hidden_act="poly_norm")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert AutoConfig.from_pretrained(tmp_path).lambda_init == model.config.lambda_init
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is GdaForCausalLM
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is GdaModel


def test_a_missing_tensor_is_reported(tmp_path):
    """The empty reports above mean something: one deleted tensor is named."""
    model = make()
    weights = model.state_dict()
    del weights["model.layers.1.self_attn.lambda_q2"]
    model.save_pretrained(tmp_path, state_dict=weights)
    _, report = GdaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"model.layers.1.self_attn.lambda_q2"}
