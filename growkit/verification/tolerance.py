"""The one rule that says how far two exact checkpoints may be apart.

Growth that is exact in real arithmetic still sums in another order: more heads, wider matrices,
other matrix-multiplication blocks. Every one of the ``2 L + 1`` writes to the residual stream
(embedding, then attention and feed-forward of each of ``L`` layers) is rounded with a relative
error of a few ``eps``; the errors are independent, so they add up like a random walk:

    tolerance = (C_compute * eps(compute) + C_storage * eps(storage)) * sqrt(2 L + 1) * s

* ``eps`` is the machine epsilon. The storage term is there only when the plan says that weights
  were rounded on writing (``rounded``: a third of a weight, a rescaled gain), because the two
  models then really have slightly different weights.
* ``L`` is the number of layers of the deeper model.
* ``s`` is the root mean square of A's logits over the compared tokens, and 1 for the relative
  differences of residual streams.
* ``C_compute`` is 128 for float32 and float64, whose matrix products accumulate in the dtype
  itself, and 16 for bfloat16 and float16, whose products accumulate in float32 so that only
  the results are rounded. ``C_storage`` is 8.

How the constants were chosen: the largest difference in units of the tolerance, on random models
(3 to 32 layers, hidden 64 to 768) and on SmolLM2-135M (30 layers, trained):

    exact growth (heads, feed-forward, both), float32 compute      0.03 - 0.14   SmolLM2 0.11
    the same in bfloat16 compute                                   0.10 - 0.25
    shares of 1/3, or a rescaled gain, rounded to bfloat16         0.01 - 0.22
    one head's o_proj columns of one layer x (1 + 2^-8), float32   above 85      SmolLM2 28
    heads tiled instead of interleaved, float32                    above 5e4     SmolLM2 5.5e4
    the same, with the tolerance of a rounded bfloat16 checkpoint  above 12

Some models amplify rounding: a norm that divides the small difference of two nearly equal attention
maps (differential attention with lambda near 1). Where a difference exceeds the rule, A itself is
computed once more in float64 on the same tokens, and where weights were rounded, once more with
every weight off by a random part of its rounding; never B. The tolerance is then at least

    8 * (A's own rounding) + 4 * (what rounded weights do to A)

in logits (amplification.py). An ordinary model's own rounding is a small part of the rule,
which therefore stays as it is: on 54 growths drawn from the whole matrix of families and
operators A's own rounding was 0.03 to 0.14 of the rule and B's difference at most 0.15, so two
models could have been allowed 2 % and 11 % more than the rule; what rounded weights did to A was
0.03 to 0.46 of it. The same rule, without the storage term, holds logits with a KV cache to those
without.

So a wrong operator is far outside, but a tolerance for 16-bit arithmetic or rounded weights
cannot see a fault that is smaller than that rounding: compare in float32, which is the default.
"""

from __future__ import annotations

import math

import torch

EXACTNESS = ("bit-exact", "exact", "rounded", "not-exact")

COMPUTE_FACTOR = 128.0
COMPUTE_FACTOR_16_BIT = 16.0
STORAGE_FACTOR = 8.0


def tolerance(
    scale: float,
    layers: int,
    compute: torch.dtype,
    *,
    storage: torch.dtype | None = None,
    storage_rounding: bool = False,
) -> float:
    """Largest allowed ``|difference|`` from a reference of root mean square ``scale``.

    Args:
        scale: root mean square of the reference; 1 for a relative difference.
        layers: decoder layers that the signal went through in the deeper model.
        compute: dtype of the arithmetic.
        storage: dtype of the stored weights; only read with ``storage_rounding``.
        storage_rounding: the plan rounded weights to ``storage``.
    """
    factor = COMPUTE_FACTOR_16_BIT if compute.itemsize == 2 else COMPUTE_FACTOR
    relative = factor * torch.finfo(compute).eps
    if storage_rounding and storage is not None:
        relative += STORAGE_FACTOR * torch.finfo(storage).eps
    return relative * math.sqrt(2 * layers + 1) * scale


def root_mean_square(values: torch.Tensor) -> float:
    """In float64."""
    return float(values.double().square().mean().sqrt())
