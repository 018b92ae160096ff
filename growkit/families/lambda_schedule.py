# SPDX-License-Identifier: Apache-2.0
"""Names of the lambda vectors, and the two published schedules of lambda_init by layer.

A checkpoint of our own format stores one value per layer in ``config.json``; the schedules fill
that list for a model made from scratch or read from a format that computes it from the layer index.
Pure Python: exported folders have this file too.
"""

from __future__ import annotations

import math

LAMBDA_ROLES = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def diff_lambda_init(layer: int) -> float:
    """lambda_init of DIFF Transformer and DiffLlama: 0.8 - 0.6 exp(-0.3 layer), 0-based layer.

    Layer 0 has 0.2, layer 1 has 0.3555. Source: arXiv 2410.05258, section 2.1.
    """
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


def motif_lambda_init(layer: int) -> float:
    """lambda_init of Motif: the DIFF schedule one layer late, so layer 0 has -0.0099.

    Source: MotifTechnologies/vllm, ``vllm/model_executor/models/motif.py``.
    """
    return diff_lambda_init(layer - 1)


# One line a schedule.
LAMBDA_SCHEDULES = {"diff": diff_lambda_init, "motif": motif_lambda_init}


def lambda_init_schedule(num_layers: int, kind: str = "diff") -> list[float]:
    """One lambda_init per layer, first layer first. Raises ValueError for an unknown ``kind``."""
    if kind not in LAMBDA_SCHEDULES:
        raise ValueError(
            f"Unknown lambda_init schedule {kind!r}. Valid: {', '.join(sorted(LAMBDA_SCHEDULES))}."
        )
    return [LAMBDA_SCHEDULES[kind](layer) for layer in range(num_layers)]


def follows_schedule(values: list[float], num_layers: int) -> bool:
    """Whether ``values`` are what DIFF Transformer computes from the layer index."""
    schedule = lambda_init_schedule(num_layers)
    return len(values) == num_layers and all(map(math.isclose, values, schedule))
