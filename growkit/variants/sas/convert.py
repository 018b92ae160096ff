"""Ordinary attention -> SAS: the simulation begins as a tiling of the heads.

The head convolution is a centre tap: simulated head j is head j mod H (its key/value head for k
and v). The residual blocks are zero, the features [I 0], and the queries' features carry
sqrt(D' / d), because the scores are divided by sqrt(D') instead of sqrt(d). PEAA averages equal
chunks. Rotary encoding comes after the simulation, on the original pairs, so it is untouched.

Equal copies of a head would get equal gradients for ever; +N on the value convolution of one copy
and -N on that of the next leaves their mean as it is (their maps are equal) and parts them.
Source: arXiv 2507.07694; the algebra was checked in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt, sqrt

import numpy as np

from growkit.core.errors import UsageError
from growkit.surgery.effect import (
    Array,
    Computed,
    Effect,
    Exactness,
    ModelShape,
    Operator,
    constant_rows,
    filled,
)
from growkit.variants.request import ConversionRequest
from growkit.variants.shared.from_ordinary import check_ordinary, growkit_fields

VALUE_NOISE = 0.1


@dataclass(frozen=True)
class ToSas:
    """To ``copies`` simulated heads a head, of ``width`` features, with kernels of size ``kernel``.

    Attributes:
        width: None: head_dim.
        seed: of the noise on the value convolutions.
    """

    copies: int = 2
    width: int | None = None
    kernel: int = 1
    seed: int = 0

    def apply(self, shape: ModelShape) -> Effect:
        check_ordinary(shape)
        heads, kv, dim = (shape.sizes[name] for name in ("query_head", "kv_head", "head_dim"))
        width = self.width or dim
        if width < dim or width % 2 or self.copies < 1 or self.kernel % 2 == 0:
            raise UsageError(
                f"SAS with {self.copies} simulated heads a head, {width} features and kernel "
                f"{self.kernel} does not exist.",
                f"Copies are at least 1, features an even number from {dim} on, kernels odd.",
            )
        simulated = self.copies * heads
        own = np.arange(simulated) % heads
        computed: dict[str, Computed] = {}
        for kind, count, source in (
            ("q", heads, own),
            ("k", kv, own * kv // heads),
            ("v", kv, own * kv // heads),
        ):
            prefix = f"simulate_{kind}"
            computed[f"{prefix}.heads.weight"] = constant_rows(
                partial(self._taps, count, source, kind == "v")
            )
            computed[f"{prefix}.heads.bias"] = filled((simulated,), 0.0)
            residual = (simulated, simulated, self.kernel)
            computed[f"{prefix}.heads_residual.weight"] = filled(residual, 0.0)
            computed[f"{prefix}.heads_residual.bias"] = filled((simulated,), 0.0)
            if kind == "v":
                continue
            factor = sqrt(width / dim) if kind == "q" else 1.0
            computed[f"{prefix}.features.weight"] = constant_rows(
                partial(_features, width, dim, factor)
            )
            computed[f"{prefix}.features.bias"] = filled((width,), 0.0)
            computed[f"{prefix}.features_residual.weight"] = filled((width, width), 0.0)
            computed[f"{prefix}.features_residual.bias"] = filled((width,), 0.0)
        whole = width % dim == 0 and isqrt(width // dim) ** 2 == width // dim
        return Effect(
            config=growkit_fields(shape, "sas")
            | {
                "num_attention_heads": heads,
                "num_key_value_heads": kv,
                "num_simulated_heads": simulated,
                "simulated_head_dim": width,
                "sas_kernel_size": self.kernel,
            },
            summary=f"{heads} heads -> {simulated} simulated heads of {width} features, kernel "
            f"{self.kernel}",
            exactness=Exactness.EXACT if whole else Exactness.ROUNDED,
            reason="simulated heads are copies, their average is the head",
            computed=computed,
            verbatim=frozenset(("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias")),
        )

    def _taps(self, heads: int, source: Array, noisy: bool) -> Array:
        """Kernel [H', heads, k]: head ``source`` at the centre, opposite noise on two copies."""
        taps = np.zeros((len(source), heads, self.kernel))
        taps[np.arange(len(source)), source, self.kernel // 2] = 1.0
        if noisy and self.copies > 1:
            generator = np.random.Generator(np.random.Philox(self.seed))
            pairs = taps.reshape(self.copies, -1, heads, self.kernel)
            for first in range(0, self.copies - 1, 2):
                # Multiples of 2^-7: +N and -N stay opposite in every dtype.
                noise = generator.standard_normal(pairs.shape[1:]) * VALUE_NOISE
                noise = np.round(noise * 128) / 128
                pairs[first] += noise
                pairs[first + 1] -= noise
        return taps


def _features(width: int, dim: int, factor: float) -> Array:
    """Feature map [D', d] that keeps the channels of a head and adds zeros."""
    return factor * np.eye(width, dim)


TARGETS: Mapping[str, Callable[[ConversionRequest], Operator]] = {
    "sas": lambda request: ToSas(
        request.simulated_heads, request.simulated_head_dim, request.kernel, request.seed
    ),
}
