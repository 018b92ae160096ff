"""Every variant computes what its readable definition says: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from flex_backend import backward_refusal, needs_compiler, uncompiled
from gda_cases import inputs
from test_gda_oracle import error, outputs_and_gradients
from variant_cases import CASES, TWO_CALLS, layer_of

TOLERANCE = 1e-5
# One a shape of call: shared keys, wide values with keys of their own, values narrower than keys.
SHAPES_OF_CALLS = ("gqa", "diff_v1", "sas")
EVERY_CASE = pytest.mark.parametrize("case", CASES)


def definition(layer):
    return lambda *args: layer.reference(layer, *args)


def worst(layer, reference=None) -> float:
    """Largest error of outputs and gradients, in units of the largest value of its tensor."""
    expected = outputs_and_gradients(layer, reference or definition(layer))
    actual = outputs_and_gradients(layer, lambda *args: layer(*args)[0])
    assert expected.keys() == actual.keys()
    dead = [name for name, value in expected.items() if not value.abs().max() > 1e-4]
    # a constant added to every key changes no softmax, and rotary encoding turns it into a little
    assert set(dead) <= {"k_proj.bias"}, dead
    terms = expected["v_proj.weight"].abs().max().item()  # see test_gda_oracle.worst
    units = {name: terms if name.startswith("lambda") else 1.0 for name in expected}
    return max(error(actual[name], expected[name], units[name]) for name in expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@EVERY_CASE
def test_outputs_and_every_gradient_equal_the_definition(case, implementation):
    assert worst(layer_of(case, implementation)) < TOLERANCE


@EVERY_CASE
def test_causal_is_the_default_of_both(case):
    layer = layer_of(case, "sdpa")
    hidden, position_embeddings, _ = inputs()
    expected = layer.reference(layer, hidden, position_embeddings)
    assert error(layer(hidden, position_embeddings)[0], expected) < TOLERANCE


@EVERY_CASE
def test_without_gradients_outputs_equal_the_definition_and_no_input_changes(case):
    """Layers may then work in the memory of their own queries and keys."""
    layer = layer_of(case, "sdpa")
    hidden, position_embeddings, _ = inputs()
    before = hidden.clone()
    expected = layer.reference(layer, hidden, position_embeddings)
    with torch.no_grad():
        assert error(layer(hidden, position_embeddings)[0], expected) < TOLERANCE
    assert torch.equal(hidden, before)


@EVERY_CASE
def test_flex_attention_outputs_and_every_gradient_equal_the_definition(case):
    """Left padding included, by torch's uncompiled definition of flex_attention."""
    with uncompiled():
        assert worst(layer_of(case, "flex_attention")) < TOLERANCE


REFUSAL = backward_refusal()
if REFUSAL is None and torch.__version__.startswith("2.9."):
    REFUSAL = "the compiler of torch 2.9 fails on flex_attention's backward pass on the CPU"


@pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
@pytest.mark.parametrize("case", SHAPES_OF_CALLS)
def test_compiled_flex_attention_gives_every_gradient(case):
    assert worst(layer_of(case, "flex_attention")) < TOLERANCE


@needs_compiler
@pytest.mark.parametrize("case", SHAPES_OF_CALLS)
def test_compiled_flex_attention_equals_the_definition(case):
    """The kernel, forward and with left padding; a shape that is not compiled is an error."""
    from torch.nn.attention.flex_attention import create_block_mask

    layer = layer_of(case, "flex_attention")
    hidden, position_embeddings, additive = inputs()
    allowed = additive[:, 0] == 0  # [batch, n, n]
    mask = create_block_mask(
        lambda b, h, q, k: allowed[b, q, k], len(hidden), None, *allowed.shape[1:], device="cpu"
    )
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        actual = layer(hidden, position_embeddings, mask)[0]
        expected = layer.reference(layer, hidden, position_embeddings, additive)
    assert error(actual, expected) < TOLERANCE


def test_control_flex_attention_without_the_padding_is_caught():
    layer = layer_of("gqa", "flex_attention")
    hidden, position_embeddings, additive = inputs()
    causal = torch.full_like(additive, torch.finfo(torch.float32).min).triu(1)
    expected = layer.reference(layer, hidden, position_embeddings, additive)
    with uncompiled():
        assert error(layer(hidden, position_embeddings, causal)[0], expected) > 1e-2


@EVERY_CASE
def test_a_definition_with_another_pairing_of_heads_is_caught(case):
    """Negative control: rows of q_proj in the opposite order of heads."""
    layer = layer_of(case)
    other = layer_of(case)
    with torch.no_grad():
        rows = other.q_proj.weight.unflatten(0, (-1, layer.head_dim))
        other.q_proj.weight.copy_(rows.flip(0).flatten(0, 1))
    expected, actual = definition(layer)(*inputs()), definition(other)(*inputs())
    assert error(actual, expected) > 1e-2


@EVERY_CASE
def test_attention_maps_of_all_heads_are_returned(case):
    layer = layer_of(case)
    maps = layer(*inputs())[1]
    maps_of_a_layer = getattr(layer.config, "num_simulated_heads", None)
    assert maps.shape[1] == (maps_of_a_layer or layer.config.num_attention_heads)
    assert torch.allclose(maps.sum(-1), torch.ones(maps.shape[:-1]), atol=1e-5)
    assert (case in TWO_CALLS) == ("_attend" in dir(layer))
