# SPDX-License-Identifier: Apache-2.0
"""Weights of a linear map that a variant reads instead of calling the map."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearWeights(nn.Module):
    """``weight`` [out, in] and ``bias`` [out] under the names of ``nn.Linear``, and no forward.

    On purpose no subclass of it: serving engines (packed weights), adapters (LoRA) and quantisers
    put layers of their own in the place of every ``nn.Linear``, which only calls may reach. A
    variant that reads the matrix would get bytes of another layout, or silently miss an adapter.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias: Tensor | None
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """torch's start of a linear layer: uniform within 1 / sqrt(in_features)."""
        bound = self.in_features**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` prints itself."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"
