"""The two published schedules of lambda_init over the layers (0-based index)."""

from __future__ import annotations

import math


def diff_lambda_init(layer: int) -> float:
    """0.8 - 0.6 exp(-0.3 layer): DIFF Transformer (arXiv 2410.05258) and DiffLlama."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


def motif_lambda_init(layer: int) -> float:
    """The value that DIFF has one layer earlier: 0.8 - 0.6 exp(-0.3 (layer - 1)); Motif's code."""
    return diff_lambda_init(layer - 1)
