"""PolyNorm against its formula, and as an activation that reads the whole width."""

from __future__ import annotations

import torch

from growkit.modeling import PolyNorm


def formula(z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    return weight[0] * norm(z**3) + weight[1] * norm(z**2) + weight[2] * norm(z) + bias


def module() -> PolyNorm:
    act = PolyNorm()
    act.weight.data = torch.tensor([0.5, -0.2, 0.9])
    act.bias.data = torch.tensor([0.1])
    return act


def test_equals_the_formula_with_its_gradients():
    act = module()
    z = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight, bias = act.weight.detach().double(), act.bias.detach().double()
    exact = [t.detach().double().requires_grad_() for t in (z, weight, bias)]
    expected, actual = formula(*exact), act(z)
    assert torch.allclose(actual.double(), expected, atol=1e-5)
    expected.pow(2).sum().backward()
    actual.pow(2).sum().backward()
    for mine, theirs in zip((z, act.weight, act.bias), exact, strict=True):
        assert torch.allclose(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_order_of_the_weights_matters():
    act, z = module(), torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    wrong = formula(z, act.weight.flip(0), act.bias)
    assert (act(z) - wrong).abs().max() > 0.1


def test_halves_of_the_width_cannot_be_computed_apart():
    act, z = module(), torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    apart = torch.cat([act(z[:, :8]), act(z[:, 8:])], dim=-1)
    assert (act(z) - apart).abs().max() > 1e-2


def test_bf16_in_bf16_out():
    act = module().to(torch.bfloat16)
    assert act(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
