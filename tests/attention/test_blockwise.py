"""Attention in blocks of queries computes what the definition says, in every position."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gda_cases import HEAD_DIM, HIDDEN
from test_gda_oracle import error
from variant_cases import layer_of

from growkit.variants.shared import blockwise
from growkit.variants.shared.blockwise import ROWS, blockwise_attention, runs_in_blocks

LENGTHS = [2 * ROWS, 2 * ROWS + 37]
UNEQUAL_WIDTHS = ["diff_v1", "diff_v1-plain", "shared_diff", "shared_diff-plain", "sas"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Blocks stand in for SDPA with one thread only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(n: int, heads=4, kv_heads=2, width=12, batch=2):
    generator = torch.Generator().manual_seed(3)
    shapes = ((heads, 8), (kv_heads, 8), (kv_heads, width))
    return [
        torch.randn(batch, n, count, size, generator=generator).transpose(1, 2).requires_grad_()
        for count, size in shapes
    ]


def plain(query, key, value, scaling):
    """softmax(q k^T) v in float64 with the whole map."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(group, dim=1) for part in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scaling
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def results(output, inputs):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


def worst(n: int, **shape) -> float:
    inputs = tensors(n, **shape)
    expected = results(plain(*inputs, 0.3), inputs)
    actual = results(blockwise_attention(None, *inputs, None, 0.3)[0], inputs)
    return max(error(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("n", [1, ROWS - 1, *LENGTHS])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("width", [3, 12])
def test_outputs_and_gradients_equal_the_whole_map(n, heads, width):
    assert worst(n, heads=heads[0], kv_heads=heads[1], width=width) < 1e-5


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("long", [1, 10**6])
def test_one_head_and_few_keys_at_a_time_where_scores_have_little_room(heads, long, monkeypatch):
    monkeypatch.setattr(blockwise, "SCORES", 1)
    monkeypatch.setattr(blockwise, "LONG", long)
    assert worst(4 * ROWS + 37, heads=heads[0], kv_heads=heads[1]) < 1e-5


def test_scores_of_any_size_keep_their_sums_finite(monkeypatch):
    """A running maximum: scores of a later tile far above those of the first."""
    monkeypatch.setattr(blockwise, "SCORES", 1)
    query, key, value = tensors(4 * ROWS)
    with torch.no_grad():
        query *= 30
        key[:, :, : 2 * ROWS] *= 30
    expected = results(plain(query, key, value, 1.0), [query, key, value])
    actual = results(
        blockwise_attention(None, query, key, value, None, 1.0)[0], [query, key, value]
    )
    assert max(error(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-3


def test_a_later_token_never_changes_an_earlier_output():
    query, key, value = tensors(LENGTHS[1])
    before = blockwise_attention(None, query, key, value, None, 0.3)[0]
    with torch.no_grad():
        for part in (query, key, value):
            part[:, :, 200:] += 1
    after = blockwise_attention(None, query, key, value, None, 0.3)[0]
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


def test_control_tiles_that_forget_their_maximum_are_caught(monkeypatch):
    monkeypatch.setattr(blockwise, "SCORES", 1)
    monkeypatch.setattr(torch, "maximum", lambda before, highest: highest)
    monkeypatch.setattr(torch, "exp2", torch.ones_like)
    assert worst(LENGTHS[1]) > 1e-2


def test_control_a_tile_that_sees_its_own_future_is_caught(monkeypatch):
    monkeypatch.setattr(
        blockwise._Tiles,
        "scores",
        lambda tiles, query, key, scaling, rows, keys: tiles.product(query, key, 0, scaling),
    )
    assert worst(LENGTHS[1]) > 1e-2


@pytest.mark.parametrize("case", UNEQUAL_WIDTHS)
def test_layers_with_unequal_widths_run_in_blocks_and_equal_the_definition(case, monkeypatch):
    layer, n, calls = layer_of(case, "sdpa"), LENGTHS[1], []
    monkeypatch.setattr(
        blockwise,
        "_Tiles",
        lambda *query, of=blockwise._Tiles, **buffers: calls.append(1) or of(*query, **buffers),
    )
    hidden = torch.randn(2, n, HIDDEN, generator=torch.Generator().manual_seed(1))
    angles = torch.arange(n)[:, None] / 50.0 ** (torch.arange(HEAD_DIM // 2) / HEAD_DIM)
    angles = torch.cat((angles, angles), dim=-1)[None]
    positions = (angles.cos(), angles.sin())
    inputs = [hidden.requires_grad_(), *layer.parameters()]
    expected = results(layer.reference(layer, hidden, positions), inputs)
    assert not calls
    actual = results(layer(hidden, positions)[0], inputs)
    assert len(calls) == (2 if case == "sas" else 4)  # forward and backward of every call
    assert max(error(a, e) for a, e in zip(actual, expected, strict=True)) < 2e-5


def test_everything_else_stays_with_the_backend():
    query, key, value = (part.detach() for part in tensors(2 * ROWS))
    width = value.shape[-1]
    assert runs_in_blocks("sdpa", query, key, width, None)
    assert not runs_in_blocks("eager", query, key, width, None)
    assert not runs_in_blocks("sdpa", query, key, key.shape[-1], None), "a fused kernel exists"
    assert not runs_in_blocks("sdpa", query, key, width, torch.zeros(1, 1, 1, 1)), "padding"
    assert not runs_in_blocks("sdpa", query[:, :, -1:], key, width, None), "a step of generation"
    assert not runs_in_blocks("sdpa", query[:, :, :9], key[:, :, :9], width, None), "short"
    torch.set_num_threads(2)
    assert not runs_in_blocks("sdpa", query, key, width, None), "several threads"
    torch.set_num_threads(1)
    assert not runs_in_blocks("sdpa", query.bfloat16(), key.bfloat16(), width, None)
    with torch.autocast("cpu"):
        assert not runs_in_blocks("sdpa", query, key, width, None)
