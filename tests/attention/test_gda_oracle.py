"""The fast path computes what the definition says: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from flex_backend import uncompiled
from gda_cases import FORM_IDS, FORMS, HEADS, attention_layer, gda_config, inputs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from growkit.variants.gda.attention import GdaAttention, GdaAttentionBase, gda_attention_reference

TOLERANCE = 1e-5


def error(actual: torch.Tensor, expected: torch.Tensor, unit: float = 1.0) -> float:
    """Largest difference in units of the largest expected value (at least ``unit``)."""
    scale = max(unit, expected.abs().max().item())
    return (actual - expected).abs().max().item() / scale


def outputs_and_gradients(layer, function) -> dict[str, torch.Tensor]:
    hidden, position_embeddings, mask = inputs()
    hidden.requires_grad_()
    layer.zero_grad()
    output = function(hidden, position_embeddings, mask)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    (output * weights).sum().backward()
    found = {"output": output.detach(), "hidden_states": hidden.grad}
    return found | {name: p.grad.clone() for name, p in layer.named_parameters()}


def oracle(layer) -> dict[str, torch.Tensor]:
    return outputs_and_gradients(layer, lambda *args: gda_attention_reference(layer, *args))


def fast(layer) -> dict[str, torch.Tensor]:
    return outputs_and_gradients(layer, lambda *args: layer(*args)[0])


def worst(layer) -> float:
    expected, actual = oracle(layer), fast(layer)
    assert expected.keys() == actual.keys()
    assert all(value.abs().max() > 0 for value in expected.values()), "a gradient is dead"
    # The lambda gradients are one sum over all tokens and heads, which cancels: its rounding is
    # that of its terms, which are as large as v_proj's gradient, not that of the small result.
    terms = expected["v_proj.weight"].abs().max().item()
    units = {name: terms if name.startswith("lambda") else 1.0 for name in expected}
    return max(error(actual[name], expected[name], units[name]) for name in expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("noise_keys", "norm"), FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_outputs_and_every_gradient_equal_the_definition(heads, noise_keys, norm, implementation):
    layer = attention_layer(gda_config(heads, noise_keys, norm, implementation))
    assert worst(layer) < TOLERANCE


@pytest.mark.parametrize(("noise_keys", "norm"), FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("heads", ["3:1", "1:2"])
def test_flex_attention_outputs_and_every_gradient_equal_the_definition(heads, noise_keys, norm):
    """Left padding included, by torch's uncompiled definition of flex_attention."""
    layer = attention_layer(gda_config(HEADS[heads], noise_keys, norm, "flex_attention"))
    with uncompiled():
        assert worst(layer) < TOLERANCE


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_backends_that_want_equal_widths_get_halves_of_the_values(heads):
    """Flash kernels take values as wide as keys; a wider V would be cropped silently."""

    def equal_widths(module, query, key, value, attention_mask, **kwargs):
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("equal_widths", equal_widths)
    layer = attention_layer(gda_config(heads))
    layer.config._attn_implementation_internal = "equal_widths"
    assert worst(layer) < TOLERANCE


@pytest.mark.parametrize(("noise_keys", "norm"), FORMS, ids=FORM_IDS)
def test_causal_mask_is_the_default_of_both(noise_keys, norm):
    layer = attention_layer(gda_config(noise_keys=noise_keys, sub_layer_norm=norm))
    layer.config._attn_implementation_internal = "sdpa"
    hidden, position_embeddings, _ = inputs()
    expected = gda_attention_reference(layer, hidden, position_embeddings)
    assert error(layer(hidden, position_embeddings)[0], expected) < TOLERANCE


def test_boolean_and_additive_masks_mean_the_same_to_the_oracle():
    layer = attention_layer(gda_config())
    hidden, position_embeddings, mask = inputs()
    expected = gda_attention_reference(layer, hidden, position_embeddings, mask)
    actual = gda_attention_reference(layer, hidden, position_embeddings, mask == 0)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("noise_keys", ["own", "shared"])
def test_attention_maps_are_returned_in_stripe_order(noise_keys):
    """Swapping the rows of two query heads swaps their maps and no others."""
    layer = attention_layer(gda_config((6, 2, 2), noise_keys))
    before = layer(*inputs())[1]
    assert before.shape[1] == 8
    first_noise, last_noise = 3, 7
    with torch.no_grad():
        rows = layer.q_proj.weight.view(8, -1, layer.q_proj.in_features)
        rows[first_noise] = rows[first_noise] * 2
    after = layer(*inputs())[1]
    changed = [h for h in range(8) if not torch.allclose(before[:, h], after[:, h])]
    assert changed == [first_noise]
    assert last_noise not in changed


def test_a_paged_cache_is_refused_where_it_would_be_written_twice():
    layer = attention_layer(gda_config(noise_keys="own"))
    with pytest.raises(ValueError, match="noise_keys = 'shared'"):
        layer(*inputs(), cache=object(), block_table=object())


# What would be wrong without being noticed on load: each of these must be seen.


def test_control_pairing_by_halves_is_caught(monkeypatch):
    def halves(self, path, query, *others):
        return attend(self, path, query.roll(1, dims=1), *others)

    attend = GdaAttention._attend
    layer = attention_layer(gda_config((4, 4, 4)))
    monkeypatch.setattr(GdaAttention, "_attend", halves)
    assert worst(layer) > 1e-2


def test_control_tiled_noise_is_caught(monkeypatch):
    """Noise heads tiled over the signal heads instead of one noise head per stripe."""

    def tiled(self, signal, noise):
        groups, size = signal.shape[2:4]
        order = torch.arange(groups * size) % groups
        return combine(self, signal, noise[:, :, order, 0].unflatten(2, (groups, size)))

    combine = GdaAttentionBase.difference
    layer = attention_layer(gda_config((6, 2, 2)))
    monkeypatch.setattr(GdaAttentionBase, "difference", tiled)
    assert worst(layer) > 1e-2


@pytest.mark.parametrize("noise_keys", ["own", "shared"])
def test_control_missing_lambda_is_caught(noise_keys, monkeypatch):
    layer = attention_layer(gda_config(noise_keys=noise_keys))
    expected = gda_attention_reference(layer, *inputs())
    monkeypatch.setattr(GdaAttentionBase, "lambda_full", lambda self: torch.tensor(0.0))
    assert error(layer(*inputs())[0], expected) > 1e-2


@pytest.mark.parametrize("noise_keys", ["own", "shared"])
def test_control_ignored_padding_is_caught(noise_keys):
    layer = attention_layer(gda_config(noise_keys=noise_keys, implementation="sdpa"))
    hidden, position_embeddings, mask = inputs()
    expected = gda_attention_reference(layer, hidden, position_embeddings, mask)
    assert error(layer(hidden, position_embeddings)[0], expected) > 1e-2


def test_control_scale_of_the_norm_is_caught():
    layer = attention_layer(gda_config())
    expected = gda_attention_reference(layer, *inputs())
    layer.lambda_init = 0.0  # the scale would be 1 and lambda too small
    assert error(layer(*inputs())[0], expected) > 1e-2
