"""Which parameters lambda is computed from, by name. No torch here."""

from __future__ import annotations


def is_lambda(name: str) -> bool:
    """Whether a parameter belongs to lambda: its vectors, or a projection that makes it."""
    return any(component.startswith("lambda") for component in name.split("."))


def is_lambda_vector(name: str, dimensions: int) -> bool:
    """Whether a parameter is a lambda vector (or scalar) itself.

    exp() of their dot products makes lambda, so that bfloat16's rounding would move it visibly:
    they stay in float32 whatever the dtype of the weights.
    """
    return dimensions < 2 and name.rpartition(".")[2].startswith("lambda")
