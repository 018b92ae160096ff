"""Muon in batches is torch's Muon: the same weights and momenta, whatever is batched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from growkit.training import muon
from growkit.training.muon import BatchedMuon, orthogonalised

SHAPES = ((16, 16), (16, 16), (48, 16), (16, 48), (48, 16), (16, 48), (16, 16), (24, 8))


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(optimizer: Any, weights: list[Parameter], steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            if i == 1 and step == 1:
                weight.grad = None  # took no part in this step
        optimizer.step()


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_take_the_steps_of_the_library(
    adjust: str | None, nesterov: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of all that are equal, of two at most, and none."""
    settings: dict[str, Any] = {"lr": 0.02, "nesterov": nesterov, "adjust_lr_fn": adjust}
    expected = parameters(dtype)
    library = torch.optim.Muon(expected, **settings)
    train(library, expected)
    for batch, small in ((1 << 20, 1 << 16), (2 * 16 * 48, 1 << 16), (1 << 20, 1)):
        monkeypatch.setattr(muon, "BATCH", batch)
        monkeypatch.setattr(muon, "SMALL_ON_CPU", small)
        found = parameters(dtype)
        ours = BatchedMuon(found, **settings)
        train(ours, found)
        # A kernel for batches may round a product to the other neighbour in bfloat16.
        tolerance = 0.0 if small == 1 else 0.02 * 3 * 2**-7
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=0.0, atol=tolerance)
            buffers = ours.state[left]["momentum_buffer"], library.state[right]["momentum_buffer"]
            assert torch.equal(*buffers)
        assert ours.state_dict().keys() == library.state_dict().keys()


def test_every_matrix_of_a_batch_is_orthogonalised_by_itself() -> None:
    """One matrix a thousand times larger than its neighbour changes nothing of it."""
    from torch.optim._muon import _zeropower_via_newtonschulz as one

    settings: Any = ((3.4445, -4.7750, 2.0315), 5, 1e-7)
    matrices = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(2))
    matrices[1] *= 1000
    for batch in (matrices, matrices.mT.contiguous()):
        found = orthogonalised(batch, *settings)
        for matrix, result in zip(batch, found, strict=True):
            torch.testing.assert_close(result, one(matrix, *settings), rtol=0.0, atol=2**-7)
    mixed = orthogonalised(matrices.flatten(0, 1)[None], *settings)[0].view(3, 40, 16)
    assert float((mixed[0] - orthogonalised(matrices, *settings)[0]).abs().max()) > 0.05
