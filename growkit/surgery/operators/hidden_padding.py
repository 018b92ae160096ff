"""Hidden width to any size by padding: with zeros under RMSNorm, with the mean under LayerNorm.

From E to E^ channels, r = E / E^. Under RMSNorm (arXiv 2308.06103) the stream becomes [x, 0]: its
mean square falls by r, so gains are multiplied by sqrt(r) and epsilon by r::

    sqrt(r) g x / sqrt(r ms(x) + r eps)  =  g x / sqrt(ms(x) + eps)

Under LayerNorm (LEMON, arXiv 2310.07999) zeros would move the mean, so the stream becomes
[x, mean(x)]: new entries of whatever writes it are the mean of the old ones; the variance falls by
r, and gain and bias of the new channels are zero. In both, old entries keep their bytes but for the
gains, which are stored in float32, and new columns of whatever reads the stream are random: they
read zeros now, and let a gradient through to the new channels.

Where epsilon is a constant of the class (OPT) it cannot be rescaled: the stream is multiplied by
sqrt(1 / r) instead, so that variances stay, and with it everything that writes it (rounded).

Where another norm reads the same epsilon (of query and key heads; it has no padding), whatever it
normalises is multiplied by sqrt(r) too: sqrt(r) q / sqrt(r ms(q) + r eps). That is done in float32
checkpoints alone. In 16-bit ones it would round by 2^-9, and what it mends is about eps / ms(q).
"""

from __future__ import annotations

from math import frexp, sqrt

import ml_dtypes
import numpy as np

from growkit.surgery.axis_map import AxisMap
from growkit.surgery.growth import Exactness, Growth, ModelShape
from growkit.surgery.new_units import Fill, NewUnits

ZEROS = NewUnits(produced=Fill.ZERO, consumed=Fill.INIT, normed=Fill.INIT)
MEANS = NewUnits(produced=Fill.MEAN, consumed=Fill.INIT, normed=Fill.ZERO)


def pad_hidden(shape: ModelShape, target: int) -> Growth:
    """Grow ``hidden_size`` to ``target`` by new channels that carry nothing yet."""
    width, norm = shape.sizes["hidden"], shape.family.norm
    ratio = width / target
    tied, scaled = bool(shape.sizes["tied"]), shape.family.sqrt_embedding_scale
    # The class multiplies embeddings by sqrt(hidden_size); a tied output reads them without that.
    embedding = sqrt(ratio) if scaled else 1.0
    stream = 1.0 if norm.eps_field else sqrt(1 / ratio)
    final = 1 / (embedding * stream) if tied else 1.0
    if shape.family.sqrt_head_divisor(shape.sizes):
        final *= sqrt(1 / ratio)
    rounds = norm.centred or any(frexp(factor)[0] != 0.5 for factor in (embedding, stream))
    config = {}
    notes = []
    if norm.eps_field:
        eps = shape.config.get(norm.eps_field, norm.eps)
        config[norm.eps_field] = eps * ratio
        notes.append(f"{norm.eps_field} {eps:g} -> {eps * ratio:.6g}")
    else:
        notes.append(f"residual stream x {stream:.4g}, as the class holds epsilon constant")
    shared = norm.shared_with and norm.eps_field
    if shared:
        rounds = True
        notes.append(f"which {norm.shared_with} share")
    return Growth(
        operator="hidden",
        summary=f"hidden size {width} -> {target} (padded; {', '.join(notes)})",
        axes={"hidden": AxisMap.with_new(width, target, 1)},
        new_units={"hidden": MEANS if norm.centred else ZEROS},
        final_norm_factor=final,
        embedding_factor=embedding,
        norm_factor=sqrt(ratio),
        stream_factor=stream,
        config=config,
        exactness=Exactness.ROUNDED if rounds else Exactness.EXACT,
        reason=_reason(norm.centred, norm.eps_field),
        warnings=(
            *(_shared_eps(norm.shared_with, norm.eps_field, config, ratio) if shared else ()),
            *(bfloat16_warning(width, target) if scaled else ()),
        ),
    )


def _reason(centred: bool, eps_field: str | None) -> str:
    source = (
        "new channels carry the mean of the old ones, with zero gain and bias (LEMON, arXiv "
        "2310.07999)"
        if centred
        else "new channels are zero (arXiv 2308.06103)"
    )
    if eps_field is None:
        return f"{source}; what writes the stream is rescaled so that its variance stays"
    return f"{source}; gains carry sqrt(E/E^), and it is exact only with the rescaled {eps_field}"


def _shared_eps(
    names: str, field: str | None, config: dict[str, float], ratio: float
) -> tuple[str, ...]:
    """What a norm with nothing to pad makes of a smaller epsilon."""
    assert field is not None
    change = config[field] * (1 / ratio - 1) / 2
    return (
        f"{names} share the rescaled {field}: float32 projections in front of them carry the "
        f"factor that makes up for it; 16-bit ones stay as they are, and where the mean square of "
        f"a head is m, what the norm makes of it grows by {change:.2g} / m of itself",
    )


def bfloat16_warning(width: int, target: int) -> tuple[str, ...]:
    """A class that scales embeddings by sqrt(hidden_size) rounds that number to the dtype."""
    before = float(np.float32(width**0.5).astype(ml_dtypes.bfloat16))
    after = float(np.float32(target**0.5).astype(ml_dtypes.bfloat16))
    change = after / before / (target / width) ** 0.5 - 1.0
    if abs(change) < 1e-9:
        return ()
    return (
        f"in bfloat16 compute the class rounds its embedding scale sqrt({width}) to {before:g} and "
        f"sqrt({target}) to {after:g}, which scales embeddings by {1 + change:.5f}; a factor of 4 "
        "would not, and float32 compute does not",
    )
