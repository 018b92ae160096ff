"""Ordinary attention -> Grouped Differential Attention in its plain form.

Every query head becomes a signal head; each group of ``ratio`` signal heads gets a new noise head
on the same keys and values; no sub-layer norm. Two exact starts (docs/algebra.md 11: without
the norm the difference is linear in its maps, DIFF Transformer arXiv 2410.05258, section 2):

* ``lambda 0``: A_s V - 0 A_n V. Noise queries are random. lambda = exp(lq1.lk1) - exp(lq2.lk2) +
  lambda_init with lq1 = lq2 = 0, lk1 and lk2 random and lambda_init 0: lambda is 0 but its gradient
  is not (with all four vectors zero it would be a dead point). Bit-exact.
* ``mirror``, 1:1 only: the noise head is a copy of its signal head, so (1 - lambda) A V is left;
  W_O is multiplied by 1 / (1 - lambda). Lossless for lambda 1/2, 3/4 ...; the two maps get opposite
  gradients and part at the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import frexp, isfinite

import numpy as np

from growkit.core.errors import UsageError
from growkit.families.differential import divisors
from growkit.surgery.axis_map import NEW, AxisMap
from growkit.surgery.effect import Alias, Effect, Exactness, ModelShape, Operator
from growkit.variants.diffllama.convert import OWN_KEYS, ToDifferential
from growkit.variants.request import ConversionRequest
from growkit.variants.shared.from_ordinary import check_ordinary, decoder_fields


@dataclass(frozen=True)
class ToGda:
    """To GDA with ``ratio`` signal heads a noise head.

    Attributes:
        ratio: None: as many as query heads share a key/value head.
        mirror: lambda of mirrored noise heads (below 1, not 0), or None for lambda 0.
    """

    ratio: int | None = None
    mirror: float | None = None

    def apply(self, shape: ModelShape) -> Effect:
        if shape.family.name in OWN_KEYS:
            return self._from_differential(shape)
        check_ordinary(shape)
        heads, kv = shape.sizes["query_head"], shape.sizes["kv_head"]
        ratio = self._ratio(heads, kv)
        noise = heads // ratio
        layers = shape.sizes["layer"]
        config = decoder_fields(shape) | {
            "model_type": "gda",
            "architectures": ["GdaForCausalLM"],
            "num_attention_heads": heads + noise,
            "num_noise_heads": noise,
            "num_key_value_heads": kv,
            "noise_keys": "shared",
            "sub_layer_norm": False,
            "lambda_init": [self.mirror or 0.0] * layers,
        }
        mirrored = self.mirror is not None
        source = np.arange(heads) if mirrored else np.full(noise, NEW)
        factor = 1.0 / (1.0 - self.mirror) if self.mirror is not None else 1.0
        return Effect(
            config=config,
            summary=f"{heads} query heads -> {heads} signal heads and {noise} "
            + (f"mirrored noise heads, lambda {self.mirror:g}" if mirrored else "new noise heads")
            + ("" if mirrored else ", lambda 0"),
            exactness=self._exactness(factor),
            reason="each map minus lambda times itself, the output divided by 1 - lambda"
            if mirrored
            else "lambda 0 subtracts zero, and its gradient is not zero",
            aliases={"signal_head": Alias("query_head"), "noise_head": Alias("query_head")},
            axes={"noise_head": AxisMap(source, heads, partial=True)},
            factors={"o": factor},
            starts={"lambda_q1": "zeros", "lambda_q2": "zeros"},
            warnings=()
            if mirrored
            else (
                "the noise queries get no gradient in the first step, while lambda is 0; lambda "
                "has one from the start",
            ),
        )

    def _from_differential(self, shape: ModelShape) -> Effect:
        if self.ratio is not None or self.mirror is not None:
            raise UsageError(
                f"--ratio and --mirror are for ordinary sources; this is {shape.family.name}.",
                "Leave them out, and change the ratio by growkit grow --noise-heads.",
            )
        return ToDifferential("gda").apply(shape)

    def _exactness(self, factor: float) -> Exactness:
        if self.mirror is None:
            return Exactness.BIT_EXACT
        return Exactness.EXACT if frexp(factor)[0] == 0.5 else Exactness.ROUNDED

    def _ratio(self, heads: int, kv: int) -> int:
        mirror = self.mirror
        if mirror is not None and not (isfinite(mirror) and mirror < 1 and mirror != 0):
            raise UsageError(
                f"--mirror {mirror:g}: what is left of a mirrored map is (1 - lambda) of it.",
                "Give a number below 1 other than 0; 0.5 and 0.75 are lossless in every dtype.",
            )
        ratio = self.ratio or (1 if mirror is not None else heads // kv)
        if mirror is not None and ratio != 1:
            raise UsageError(
                f"--ratio {ratio} with --mirror: a noise head that several signal heads share "
                "cannot mirror all of them.",
                "Use --ratio 1, or leave --mirror out.",
            )
        if (heads // kv) % ratio:
            raise UsageError(
                f"--ratio {ratio} does not divide the {heads // kv} query heads of a key/value "
                "head.",
                f"Signal heads a noise head that fit: {divisors(heads // kv)}.",
            )
        return ratio


TARGETS: Mapping[str, Callable[[ConversionRequest], Operator]] = {
    "gda": lambda request: ToGda(request.ratio, request.mirror),
}
