"""The formats of differential attention with own keys into each other: the same numbers, moved.

DIFF V1 stores the two maps of a head beside each other, DiffLlama in halves, Motif and GDA in
stripes; at one noise head a signal head all of them hold the same model. The order of the units
comes from the families' own layouts, that of the channels in a head from ``unilm.py``. To
DiffLlama, which has less to store them in:

* its per-head norm has no gain: ``subln`` goes into the columns of o_proj;
* lambda_init is a function of the layer index: the lambda vectors keep lambda, and
  ``(1 - before) / (1 - after)`` goes into o_proj;
* its per-head norm shares the epsilon of the others: with c = sqrt(after / before) on v_proj,
  c x / sqrt(c^2 mean(x^2) + after) = x / sqrt(mean(x^2) + before).

Sources: arXiv 2410.05258, section 2.1; transformers ``models/diffllama``; arXiv 2511.07464.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from growkit.checkpoint import Checkpoint
from growkit.core.errors import UsageError
from growkit.families import FAMILIES
from growkit.families.differential import LAMBDA_STD
from growkit.families.lambda_schedule import diff_lambda_init
from growkit.surgery.effect import Array, Computed, Effect, Exactness, ModelShape, Operator
from growkit.surgery.lambdas import LambdaChange
from growkit.variants.request import ConversionRequest
from growkit.variants.unilm_diff_v1.convert import UNILM, reordered_channels, to_unilm

OWN_KEYS = ("gda", "diff_v1", "diffllama", "motif", UNILM)
NEEDS_PAIRS = ("diff_v1", "diffllama", UNILM)


@dataclass(frozen=True)
class ToDifferential:
    """To the format ``to``: ``gda``, ``diff_v1``, ``diffllama`` or ``unilm_diff_v1``."""

    to: str

    def apply(self, shape: ModelShape) -> Effect:
        self._check(shape)
        adopt = FAMILIES["gda"].adopt
        assert adopt is not None
        # Our GDA config says all that any of these formats knows.
        config = adopt(shape.config, shape.family, shape.sizes)
        if self.to == "diffllama":
            return _to_diffllama(shape, config)
        if self.to in ("diff_v1", UNILM):
            for field in ("num_noise_heads", "noise_keys"):
                del config[field]
            config |= {
                "model_type": "growkit",
                "architectures": ["GrowkitForCausalLM"],
                "attention": self.to,
            }
        if self.to == UNILM:
            return to_unilm(shape, config)
        return Effect(
            config=config,
            summary=f"{shape.family.name} -> {self.to}: the same weights in another order",
            exactness=Exactness.EXACT,
            reason="every head keeps its weights, its lambda and its norm",
            by_role=reordered_channels(shape, self.to),
        )

    def _check(self, shape: ModelShape) -> None:
        name, sizes = shape.family.name, shape.sizes
        if name not in OWN_KEYS or sizes["parts"] != 2:
            shared = name in OWN_KEYS
            raise UsageError(
                f"A {name} checkpoint cannot become {self.to}: "
                + (
                    "its maps share their keys (noise_keys shared)."
                    if shared
                    else "it is not differential attention with keys of its own for each map."
                ),
                f"Sources of --to {self.to}: {', '.join(OWN_KEYS)} with own keys.",
            )
        if name == self.to:
            raise UsageError(f"This checkpoint is {name} already.", "Nothing to convert.")
        signal, noise = sizes["signal_head"], sizes["noise_head"]
        if self.to in NEEDS_PAIRS and signal != noise:
            raise UsageError(
                f"{self.to} holds as many noise as signal heads, and this checkpoint has {noise} "
                f"for {signal}.",
                f"Grow them first, exactly: growkit grow --noise-heads {signal}."
                if signal % noise == 0
                else f"Grow them first: growkit grow --signal-heads {noise}.",
            )


def _to_diffllama(shape: ModelShape, config: dict[str, Any]) -> Effect:
    sizes = shape.sizes
    objections = {
        "it does not normalise the output of a head (sub_layer_norm false)": not config[
            "sub_layer_norm"
        ],
        "its projections have biases": sizes["attention_bias"] or sizes["output_bias"],
        "its query and key heads are normalised (qk_norm)": sizes["qk_norm"],
        "its activation is poly_norm": sizes["poly_norm"],
    }
    for reason, holds in objections.items():
        if holds:
            raise UsageError(
                f"This {shape.family.name} checkpoint cannot become diffllama: {reason}.",
                "--to gda and --to diff_v1 hold it.",
            )
    eps = float(config.get("rms_norm_eps", 1e-6))
    before = float(config["attn_rms_norm_eps"])
    ours = {"noise_keys", "sub_layer_norm", "attn_rms_norm_eps", "lambda_init", "num_noise_heads"}
    ours |= {"attention_output_bias", "qk_norm", "qk_norm_eps", "lambda_std"}
    values = {} if eps == before else {"v": sqrt(eps / before)}
    return Effect(
        config={k: v for k, v in config.items() if k not in ours}
        | {
            "model_type": "diffllama",
            "architectures": ["DiffLlamaForCausalLM"],
            "attention_bias": False,
            "rms_norm_eps": eps,
            "lambda_std_dev": config.get("lambda_std", LAMBDA_STD),
        },
        summary=f"{shape.family.name} -> diffllama: gains of the heads' norms and the change of "
        "lambda_init folded into o_proj",
        exactness=Exactness.ROUNDED,
        reason="a gain in front of o_proj is a factor on its columns",
        factors=values,
        computed={"o": _folded_output(shape)},
        by_role=reordered_channels(shape, "diffllama"),
    )


def _folded_output(shape: ModelShape) -> Computed:
    """o_proj [hidden, heads x 2 head_dim] times the gains and the change of 1 - lambda_init."""
    output, gain = shape.family.tensor("o"), shape.family.tensor("subln")
    start = shape.family.lambda_init
    assert output is not None and gain is not None and start is not None
    heads = shape.sizes["signal_head"]

    def rows(checkpoint: Checkpoint, layer: int, first: int, count: int) -> Array:
        change = LambdaChange(start(checkpoint.config, layer), diff_lambda_init(layer))
        gains = checkpoint.read(gain.name.replace("{layer}", str(layer))).astype(np.float64)
        block = checkpoint.read_rows(output.name.replace("{layer}", str(layer)), first, count)
        product: Array = block.astype(np.float64) * np.tile(gains * change.scale_factor, heads)
        return product

    return Computed(rows, ("o",))


TARGETS: Mapping[str, Callable[[ConversionRequest], Operator]] = {
    "diffllama": lambda request: ToDifferential("diffllama"),
    "unilm_diff_v1": lambda request: ToDifferential(UNILM),
}
