"""What the differential families share: signal and noise heads, key pairs, lambda vectors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from growkit.core.errors import UsageError
from growkit.families import decoder
from growkit.families.base import Dim, Family, Link, Tensor, consumes, produces
from growkit.families.decoder import ATTENTION, LAYER, evenly_shared, flag
from growkit.families.lambda_schedule import LAMBDA_ROLES
from growkit.families.unit_layout import IntArray, Sizes, fixed, head_dim, plain, stripes, value_dim

# Of lambda vectors from scratch where the config does not say it (arXiv 2410.05258; our classes).
LAMBDA_STD = 0.1


def signal_to_noise(sizes: Sizes) -> IntArray:
    """Noise heads of each signal head; shape [n_signal, noise heads a signal head].

    Ratio 1:1 and above: one noise head serves n_signal / n_noise signal heads. Below: a signal head
    subtracts the sum of its n_noise / n_signal noise maps.
    """
    signal, noise = sizes["signal_head"], sizes["noise_head"]
    if signal >= noise:
        return (np.arange(signal) * noise // signal).reshape(-1, 1)
    return np.arange(noise).reshape(signal, -1)


def map_sizes(family: Family, sizes: Sizes) -> Sizes | None:
    """Sizes with the signal and noise maps of a layer; None for ordinary attention.

    Shared DIFF counts pairs of maps, which share their rows of q_proj.
    """
    if "noise_head" in sizes:
        return sizes
    if family.tensor(LAMBDA_ROLES[0]) is None:
        return None
    return {**sizes, "signal_head": sizes["query_head"], "noise_head": sizes["query_head"]}


def noise_heads(family: Family, sizes: Sizes) -> npt.NDArray[np.bool_]:
    """Which maps of a layer are subtracted, in the order of its class; shape [maps].

    ``sizes`` are those of :func:`map_sizes`. The order is that of q_proj's rows; where both maps of
    a pair share those, it is stripes.
    """
    query = family.tensor("q")
    assert query is not None
    layout = stripes("signal_head", "noise_head") if "query_head" in sizes else query.dims[0].layout
    rows = layout(sizes)
    return rows.axis == rows.axes.index("noise_head")


LINKS = (
    Link("signal_head", "noise_head", signal_to_noise),
    evenly_shared("signal_head", "kv_head"),
    evenly_shared("noise_head", "kv_head"),
)


def check_head_counts(signal: int, noise: int, kv: int, field: str = "num_noise_heads") -> None:
    """Raise UsageError unless the groups divide as GDA needs.

    Needs: one of the signal and noise counts divides the other, and kv heads divide both
    (docs/algebra.md section 2, asserted by the Motif code).
    """
    if signal < 1 or noise < 1:
        raise UsageError(
            f"{field} = {noise} leaves {signal} signal heads.",
            "Differential attention needs at least one signal and one noise head.",
        )
    if signal % noise and noise % signal:
        raise UsageError(
            f"{noise} noise heads do not divide {signal} signal heads.",
            f"Noise heads that fit {signal} signal heads: {divisors(signal)} or a multiple of "
            f"{signal}.",
        )
    if signal % kv or noise % kv:
        raise UsageError(
            f"{kv} key/value pairs do not divide {signal} signal and {noise} noise heads.",
            "num_key_value_heads has to divide both groups.",
        )


def divisors(number: int) -> str:
    """The divisors of a number, as text."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


signal_columns = consumes(plain("signal_head", value_dim))

# Facts of the formats that have neither biases nor norms of query and key heads.
PLAIN_HEADS = {"attention_bias": 0, "output_bias": 0, "qk_norm": 0}


def attention_tensors(query_rows: Dim, key_rows: Dim, value_rows: Dim) -> tuple[Tensor, ...]:
    """Projections, head norms and lambda vectors, with the family's own row orders."""
    return (
        *decoder.attention_tensors(query_rows, key_rows, value_rows, signal_columns),
        *decoder.head_norm_tensors(when=flag("qk_norm")),
        *lambda_tensors(),
    )


def lambda_tensors() -> tuple[Tensor, ...]:
    """The four vectors that lambda is made of."""
    vector = produces(fixed(head_dim))
    return tuple(Tensor(role, ATTENTION + role, (vector,)) for role in LAMBDA_ROLES)


def subln_tensor() -> Tensor:
    """Gain of the per-head norm (absent in DiffLlama)."""
    gain = produces(fixed(value_dim))
    return Tensor("subln", ATTENTION + "subln.weight", (gain,), flag("sub_layer_norm"), init="ones")


def polynorm_tensors() -> tuple[Tensor, ...]:
    """Weight [3] and bias [1] of PolyNorm (Motif)."""
    return (
        Tensor(
            "act_weight",
            LAYER + "mlp.act_fn.weight",
            (produces(fixed(lambda sizes: 3)),),
            flag("poly_norm"),
            init="thirds",
        ),
        Tensor(
            "act_bias",
            LAYER + "mlp.act_fn.bias",
            (produces(fixed(lambda sizes: 1)),),
            flag("poly_norm"),
            init="zeros",
        ),
    )


def attention_flops(sizes: Sizes) -> int:
    """Scores (width head_dim) and values (width value_dim) of every map, per unit of context."""
    maps = sizes["signal_head"] + sizes["noise_head"]
    return 2 * maps * (sizes["head_dim"] + sizes["value_dim"])


def polynorm_needs_whole_copies(sizes: Sizes) -> tuple[str, ...]:
    """PolyNorm's norm runs over the FFN width: only whole duplication keeps it."""
    return ("ffn",) if sizes["poly_norm"] else ()


def is_lambda(name: str) -> bool:
    """Whether a parameter belongs to lambda: its vectors, or a projection that makes it."""
    return any(component.startswith("lambda") for component in name.split("."))


def is_lambda_vector(name: str, dimensions: int) -> bool:
    """Whether a parameter is a lambda vector (or scalar) itself.

    exp() of their dot products makes lambda, so that bfloat16's rounding would move it visibly:
    they stay in float32 whatever the dtype of the weights.
    """
    return dimensions < 2 and name.rpartition(".")[2].startswith("lambda")
