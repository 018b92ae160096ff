# SPDX-License-Identifier: Apache-2.0
"""PolyNorm, the FFN activation of Motif."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PolyNorm(nn.Module):
    """w0 norm(z^3) + w1 norm(z^2) + w2 norm(z) + b, with norm(z) = z / sqrt(mean(z^2) + 1e-6).

    The mean runs over the last dimension (the FFN width), so the parts of a split width cannot be
    computed apart. Computed in fp32. Sources: arXiv 2411.03884; Motif-2 (arXiv 2511.07464).
    """

    eps = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 1 / 3))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, z: Tensor) -> Tensor:
        """[..., width] -> the same shape and dtype."""
        x = z.float()
        powers = (x * x * x, x * x, x)
        normed = [p * torch.rsqrt(p.pow(2).mean(-1, keepdim=True) + self.eps) for p in powers]
        w = self.weight.float()
        return (w[0] * normed[0] + w[1] * normed[1] + w[2] * normed[2] + self.bias.float()).to(
            z.dtype
        )
