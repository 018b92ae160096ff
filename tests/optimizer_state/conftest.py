"""Shared pieces of the optimizer-state tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def whole_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 throughout: our lambda and transformers' Llama norm compute in float32 by design."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def norm(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, True) + self.variance_epsilon))

    single = torch.Tensor.float

    def whole(self: torch.Tensor) -> torch.Tensor:  # positions meet frequencies in float32
        return self.double() if self.is_floating_point() else single(self)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(torch.Tensor, "float", whole)
