"""The decoder attention of T5 with shared key/value heads against its readable definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from growkit.modeling import GrowkitT5Config
from growkit.variants.wgqa_t5.attention import (
    GroupedT5Attention,
    position_bucket,
    t5_reference,
)

KINDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "scalar": {"decoder_attention": "wgqa", "wgqa_weights": "scalar"},
    "column": {"decoder_attention": "wgqa", "wgqa_weights": "column"},
    "row": {"decoder_attention": "wgqa", "wgqa_weights": "row"},
}


def layer(kind: str, groups: int = 2, cross: bool = False, attention: str = "sdpa") -> Any:
    """A layer with random weights of every kind."""
    config = GrowkitT5Config(
        d_model=24,
        d_kv=6,
        num_heads=4,
        decoder_num_key_value_heads=groups,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        dropout_rate=0.0,
        is_decoder=True,
        **KINDS[kind],
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    module = GroupedT5Attention(config, not cross, 0, not cross)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=1.0 if parameter.shape[0] in (4, 8) else 0.2)
    return module


def inputs(cross: bool) -> dict[str, Tensor]:
    """Hidden states, and for cross-attention a longer source."""
    generator = torch.Generator().manual_seed(1)
    found = {"hidden_states": torch.randn(2, 17, 24, generator=generator)}
    if cross:
        found["key_value_states"] = torch.randn(2, 21, 24, generator=generator)
    return found


def gradients(module: Any, output: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a random functional of the output, by parameter and by input."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    sources = dict(module.named_parameters()) | given
    found = torch.autograd.grad((output * weights).sum(), list(sources.values()))
    return dict(zip(sources, found, strict=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_definition_with_all_gradients(
    kind: str, cross: bool, groups: int, attention: str
) -> None:
    module = layer(kind, groups, cross, attention)
    given = {name: value.requires_grad_() for name, value in inputs(cross).items()}
    mask = torch.ones(2, 21 if cross else 17, dtype=torch.bool)
    mask[1, :3] = False
    if not cross:
        mask[1, :3] = True  # a causal row needs a token that it may attend to
    expected = t5_reference(module, **given, mask=mask)
    allowed = mask[:, None, None].expand(-1, 1, 17, -1)
    if not cross:
        allowed = allowed & torch.ones(17, 17, dtype=torch.bool).tril()
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    found = module(**given, mask=additive if attention == "eager" else allowed)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    truth = gradients(module, expected, given)
    for name, gradient in gradients(module, found, given).items():
        scale = max(1.0, float(truth[name].abs().max()))
        torch.testing.assert_close(gradient, truth[name], atol=1e-5 * scale, rtol=1e-5)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_without_sharing_it_is_transformers_layer(cross: bool) -> None:
    module = layer("gqa", 4, cross)
    theirs = T5Attention(module.config, not cross, 0, not cross)
    theirs.load_state_dict(module.state_dict())
    assert torch.equal(module(**inputs(cross))[0], theirs(**inputs(cross))[0])


@pytest.mark.parametrize("kind", ["scalar", "column", "row"])
@pytest.mark.parametrize("start", ["mean", "random"])
def test_start_of_the_weights(kind: str, start: str) -> None:
    module = layer(kind, 1)
    module.config.wgqa_init = start
    torch.manual_seed(3)
    module.init_merge()
    for weights in (module.w_k, module.w_v):
        if start == "mean":  # G / H, not the 0.5 of the released code
            assert (weights == 0.25).all()
        else:
            assert weights.std() > 0.3 and weights.unique().numel() == weights.numel()
    if start == "mean":
        heads = module.k.weight.unflatten(0, (1, 4, 6))
        torch.testing.assert_close(module.merged(module.k, module.w_k), heads.mean(1).flatten(0, 1))


@settings(deadline=None, max_examples=50)
@given(
    buckets=st.integers(2, 16).map(lambda half: 2 * half),
    further=st.integers(1, 100),
)
def test_buckets_are_those_of_transformers(buckets: int, further: int) -> None:
    farthest = buckets // 2 + further
    relative = -torch.arange(-3, 200)
    theirs = T5Attention._relative_position_bucket(relative, False, buckets, farthest)
    ours = torch.tensor([position_bucket(-int(r), buckets, farthest) for r in relative])
    # float32 logarithms may fall to the other side of a whole number
    assert (ours - theirs).abs().max() <= 1 and (ours != theirs).float().mean() < 0.03


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=8)
@given(position=st.integers(0, 16))
def test_a_later_token_changes_no_earlier_output(kind: str, position: int) -> None:
    module, states = layer(kind), inputs(False)["hidden_states"]
    changed = states.clone()
    changed[:, position] += 1.0
    before, after = module(states)[0], module(changed)[0]
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])
