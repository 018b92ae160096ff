"""Keeping lambda and (1 - lambda_init) when a layer moves or its noise maps are copied.

``lambda = e^a - e^b + L`` with ``a = lq1 . lk1``, ``b = lq2 . lk2``. To change ``e^a - e^b`` by D::

    D > 0:  a' = ln(e^a + D);   lq1 += (a' - a) lk1 / |lk1|^2      (minimum-norm change)
    D < 0:  b' = ln(e^b - D);   lq2 += (b' - b) lk2 / |lk2|^2

Source: docs/algebra.md section 7. Exact up to the rounding of the vectors (kept in float32).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import Checkpoint
from growkit.core.errors import CheckpointError
from growkit.families import Family
from growkit.families.differential import LAMBDA_ROLES

Vector = npt.NDArray[Any]


@dataclass(frozen=True)
class LambdaChange:
    """What happens to lambda in one layer.

    Attributes:
        init_before: lambda_init of the source layer.
        init_after: lambda_init that the written layer will have.
        noise_copies: lambda is divided by this.
    """

    init_before: float
    init_after: float
    noise_copies: int = 1

    @property
    def is_identity(self) -> bool:
        return self.noise_copies == 1 and self.init_before == self.init_after

    @property
    def scale_factor(self) -> float:
        """Factor on the gain that follows, so that (1 - lambda_init) times it is unchanged."""
        return (1.0 - self.init_before) / (1.0 - self.init_after)


def lambda_value(q1: Vector, k1: Vector, q2: Vector, k2: Vector, init: float) -> float:
    """lambda of a layer from its four vectors [head_dim]."""
    a, b = _dot(q1, k1), _dot(q2, k2)
    return float(np.exp(a) - np.exp(b) + init)


def layer_lambdas(checkpoint: Checkpoint, family: Family, layers: int) -> list[dict[str, float]]:
    """``lambda_init`` and ``lambda`` of every layer; empty where the model is not differential."""
    if family.lambda_init is None:
        return []
    result = []
    for layer in range(layers):
        q1, k1, q2, k2 = (checkpoint.read(name) for name in _names(family, layer))
        init = family.lambda_init(checkpoint.config, layer)
        result.append({"lambda_init": init, "lambda": lambda_value(q1, k1, q2, k2, init)})
    return result


def check_lambdas(family: Family, lambdas: Sequence[Mapping[str, float]]) -> None:
    """Raise CheckpointError, naming the layer, for a lambda that is not finite."""
    for layer, known in enumerate(lambdas):
        value, init = known["lambda"], known["lambda_init"]
        if not math.isfinite(value):
            raise CheckpointError(
                f"lambda of layer {layer} is {value}: {_names(family, layer)[0]!r} and its three "
                f"siblings, or lambda_init {init}, are not finite.",
                "Repair these vectors or use an earlier checkpoint; growth would keep the damage.",
            )


def _names(family: Family, layer: int) -> list[str]:
    """Of the four vectors of a layer."""
    tensors = (family.tensor(role) for role in LAMBDA_ROLES)
    return [tensor.name.replace("{layer}", str(layer)) for tensor in tensors if tensor]


def change_lambda(
    q1: Vector, k1: Vector, q2: Vector, k2: Vector, change: LambdaChange
) -> tuple[Vector, Vector, Vector, Vector]:
    """The four vectors [head_dim] after the change; float64 stays, all else becomes float32."""
    kept = [np.float64 if v.dtype == np.float64 else np.float32 for v in (q1, k1, q2, k2)]
    before = lambda_value(q1, k1, q2, k2, change.init_before)
    wanted = before / change.noise_copies - change.init_after
    difference = wanted - (before - change.init_before)
    q1, k1, q2, k2 = (np.asarray(v, np.float64) for v in (q1, k1, q2, k2))
    if difference > 0:
        q1, k1 = _raise_exponential(q1, k1, difference)
    elif difference < 0:
        q2, k2 = _raise_exponential(q2, k2, -difference)
    changed = zip((q1, k1, q2, k2), kept, strict=True)
    return tuple(v.astype(dtype) for v, dtype in changed)  # type: ignore[return-value]


def _dot(q: Vector, k: Vector) -> float:
    return float(np.asarray(q, np.float64) @ np.asarray(k, np.float64))


def _raise_exponential(q: Vector, k: Vector, amount: float) -> tuple[Vector, Vector]:
    """(q, k) with exp(q . k) larger by ``amount``."""
    square = float(k @ k)
    if square < 1e-12:
        # Nothing to lean on: a unit vector in place of a zero k, q cleared along it.
        k = np.full_like(k, 1.0 / np.sqrt(len(k)))
        q = q - (q @ k) * k
        square = 1.0
    exponent = float(q @ k)
    target = float(np.log(np.exp(exponent) + amount))
    return q + (target - exponent) * k / square, k
