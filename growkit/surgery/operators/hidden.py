"""Hidden width: whole copies (HyperCloning, arXiv 2409.12903), or padding to any size."""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp, sqrt
from typing import ClassVar

import ml_dtypes
import numpy as np

from growkit.core.errors import UsageError
from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Effect, Exactness, Fill, ModelShape, NewUnits, require_axis
from growkit.surgery.operators import OperatorRow
from growkit.surgery.request import GrowthRequest

ZEROS = NewUnits(produced=Fill.ZERO, consumed=Fill.INIT, normed=Fill.INIT)
MEANS = NewUnits(produced=Fill.MEAN, consumed=Fill.INIT, normed=Fill.ZERO)


def pad_hidden(shape: ModelShape, target: int) -> Effect:
    """Grow ``hidden_size`` to ``target`` by new channels that carry nothing yet."""
    width, norm = shape.sizes["hidden"], shape.family.norm
    if norm.refusal:
        raise UsageError(
            f"--hidden {target}: {shape.family.name} cannot be padded from {width}, because "
            f"{norm.refusal}.",
            f"Ask for a whole multiple of {width}.",
        )
    ratio = width / target
    tied, scaled = bool(shape.sizes["tied"]), shape.family.sqrt_embedding_scale
    # The class multiplies embeddings by sqrt(hidden_size); a tied output reads them without that.
    embedding = sqrt(ratio) if scaled else 1.0
    stream = 1.0 if norm.eps_field else sqrt(1 / ratio)
    final = 1 / (embedding * stream) if tied else 1.0
    if shape.family.sqrt_head_divisor(shape.sizes):
        final *= sqrt(1 / ratio)
    divided = dict.fromkeys(shape.family.root_divided, sqrt(1 / ratio))
    factors = (embedding, stream, *divided.values())
    rounds = norm.centred or any(frexp(factor)[0] != 0.5 for factor in factors)
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
    return Effect(
        operator="hidden",
        summary=f"hidden size {width} -> {target} (padded; {', '.join(notes)})",
        axes={"hidden": AxisMap.with_new(width, target, 1)},
        new_units={"hidden": MEANS if norm.centred else ZEROS},
        factors=stream_ends(embedding, final) | divided,
        norm_factor=sqrt(ratio),
        stream_factor=stream,
        fields=config,
        exactness=Exactness.ROUNDED if rounds else Exactness.EXACT,
        reason=_reason(norm.centred, norm.eps_field),
        warnings=(
            *(_shared_eps(norm.shared_with, norm.eps_field, config, ratio) if shared else ()),
            *(bfloat16_warning(width, target) if scaled else ()),
        ),
    )


def stream_ends(embedding: float, final: float) -> dict[str, float]:
    """Factors on what begins the residual stream and on the norm that ends it."""
    return {"embed": embedding, "final_norm": final, "final_norm_bias": final}


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


@dataclass(frozen=True)
class Hidden:
    """Grow ``hidden_size``.

    Attributes:
        amount: factor, increment or new size.
        method: ``tile`` (whole multiples), ``pad`` (any size), or ``auto``: tile where it can.
        warm: for a warm start, which pads without keeping what the norms make of it.
        copies: it has to be copies.
    """

    axis: ClassVar[str] = "hidden"
    amount: Amount
    method: str = "auto"
    warm: bool = False
    copies: bool = False

    def apply(self, shape: ModelShape) -> Effect:
        require_axis(shape, "hidden", "--hidden")
        width = shape.sizes["hidden"]
        multiple = width if self.method == "tile" else 1
        target = self.amount.resolve(width, "--hidden", "hidden channels", multiple)
        if self.warm:
            return Effect(
                operator="hidden",
                summary=f"hidden size {width} -> {target}",
                axes={"hidden": AxisMap.with_new(width, target, 1)},
            )
        if self.method == "pad" or target % width:
            if self.copies:
                raise UsageError(
                    f"--hidden {self.amount.text} with --symmetry rms: padding adds channels of "
                    "zeros, which changes the root mean square of the residual stream.",
                    f"Ask for a whole multiple of {width}, or leave --symmetry rms out.",
                )
            return pad_hidden(shape, target)
        return self._tile(shape, target)

    @staticmethod
    def _tile(shape: ModelShape, target: int) -> Effect:
        width = shape.sizes["hidden"]
        copies = target // width
        tied = bool(shape.sizes["tied"])
        scaled = shape.family.sqrt_embedding_scale
        embedding_factor = copies**-0.5 if scaled else 1.0
        final_factor = (embedding_factor if scaled else 1.0 / copies) if tied else 1.0
        if shape.family.sqrt_head_divisor(shape.sizes):
            final_factor *= copies**0.5
        divided = dict.fromkeys(shape.family.root_divided, copies**0.5)
        changed = (embedding_factor, final_factor, *divided.values())
        rounds = any(frexp(factor)[0] != 0.5 for factor in changed)
        notes = []
        if scaled:
            notes.append(f"embedding divided by sqrt({copies})")
        if final_factor != 1.0:
            change = f"divided by {1 / final_factor:.5g}"
            if final_factor > 1:
                change = f"multiplied by {final_factor:.5g}"
            notes.append(f"final norm gain {change}" + (" (tied embeddings)" if tied else ""))
        return Effect(
            operator="hidden",
            summary=", ".join([f"hidden size {width} -> {target}", *notes]),
            axes={"hidden": AxisMap.tile(width, copies)}
            | {
                axis: AxisMap.spread(shape.sizes[axis], copies * shape.sizes[axis])
                for axis in shape.family.hidden_along
            },
            factors=stream_ends(embedding_factor, final_factor) | divided,
            exactness=Exactness.ROUNDED if rounds else Exactness.EXACT,
            reason="whole copies keep mean and mean square; readers share the weight "
            "(HyperCloning, arXiv 2409.12903)",
            warnings=bfloat16_warning(width, target) if scaled else (),
        )


def make(row: OperatorRow, amount: Amount, request: GrowthRequest) -> Hidden:
    warm, copies = bool(request.warm_start), request.symmetry == "rms"
    return Hidden(amount, request.hidden_method, warm, copies and not warm)
