"""Depth: identity blocks (exact), and stacking, interpolation, SOLAR overlap (not exact).

* identity (LLaMA Pro, arXiv 2401.02415): a copy of a layer whose residual-writing projections are
  zero adds exactly nothing under any pre-norm: bit-exact.
* stack (G_stack, arXiv 2405.15319): layers 1..L repeated.
* interpolate (LiGO, AquilaMoE): every layer repeated in place.
* solar (arXiv 2312.15166): two copies of L layers, the last m of the first and the first m of the
  second dropped.

Where lambda_init depends on the layer index (DiffLlama, Motif) the plan moves lambda and
(1 - lambda_init) so that both keep their values (growth.md section 8).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from growkit.errors import UsageError
from growkit.surgery.amount import Amount
from growkit.surgery.growth import Exactness, Growth, LayerMap, LayerSource, ModelShape
from growkit.surgery.operators.require import require_axis

METHODS = ("identity", "stack", "interpolate", "solar")
PLACEMENTS = ("even", "end")


@dataclass(frozen=True)
class Depth:
    """Grow the number of layers of one stack to ``amount``. Its first layer stays the first.

    Attributes:
        amount: factor, increment or new number of layers.
        method: one of ``METHODS``.
        placement: where identity blocks go: ``even``ly, at the ``end``, or after the old layers
            with the given 0-based indices.
        stack: the axis that counts the layers: ``layer``, or ``decoder_layer`` of an
            encoder-decoder, whose ``layer`` counts the encoder's.
    """

    amount: Amount
    method: str = "identity"
    placement: str | tuple[int, ...] = "even"
    stack: str = "layer"

    @property
    def axis(self) -> str:
        """What it grows."""
        return self.stack

    @property
    def option(self) -> str:
        return f"--{self.stack.replace('_', '-')}s"

    def apply(self, shape: ModelShape) -> Growth:
        require_axis(shape, self.stack, self.option)
        layers = shape.sizes[self.stack]
        label = "layers"
        if len(shape.family.stacks) > 1:
            label = "encoder layers" if self.stack == "layer" else "decoder layers"
        target = self.amount.resolve(layers, self.option, label)
        exact = self.method == "identity"
        sources = {
            "identity": self._identity,
            "stack": self._stack,
            "interpolate": self._interpolate,
            "solar": self._solar,
        }[self.method](layers, target)
        return Growth(
            operator=f"{self.stack}s",
            summary=f"{label} {layers} -> {target} ({self.method})",
            layers=sources,
            stack=self.stack,
            exactness=Exactness.BIT_EXACT if exact else Exactness.NOT_EXACT,
            reason="inserted blocks write zero to the residual stream (LLaMA Pro, arXiv 2401.02415)"
            if exact
            else f"{self.method} repeats computing layers: another function, to be trained",
            warnings=(
                *(() if exact else (f"depth method {self.method} does not keep the function",)),
                *(_pattern_notes(shape, sources) if self.stack == "layer" else ()),
                *_deep_decoder_note(shape, self.stack, target),
            ),
        )

    def _identity(self, layers: int, target: int) -> LayerMap:
        added = target - layers
        after = self._insert_after(layers, added)
        result: list[LayerSource] = []
        for layer in range(layers):
            result.append(LayerSource(layer, "kept"))
            result.extend([LayerSource(layer, "identity")] * after.count(layer))
        return tuple(result)

    def _insert_after(self, layers: int, added: int) -> list[int]:
        if self.placement == "end":
            return [layers - 1] * added
        if self.placement == "even":
            return [int(i) for i in (np.arange(1, added + 1) * layers + added - 1) // added - 1]
        indices = [int(i) for i in self.placement]
        wrong = [i for i in indices if not 0 <= i < layers]
        if wrong:
            raise UsageError(
                f"--layer-placement names layer {wrong[0]!r}, but the checkpoint has layers 0 to "
                f"{layers - 1}.",
                "Give the 0-based indices of the layers after which a block is inserted.",
            )
        if len(indices) != added:
            raise UsageError(
                f"--layer-placement names {len(indices)} positions for {added} new layers.",
                "Give one index for each new layer (an index may be repeated).",
            )
        return indices

    @staticmethod
    def _repeat(order: list[int]) -> LayerMap:
        seen: set[int] = set()
        result = []
        for layer in order:
            result.append(LayerSource(layer, "copy" if layer in seen else "kept"))
            seen.add(layer)
        return tuple(result)

    def _stack(self, layers: int, target: int) -> LayerMap:
        if target % layers:
            raise UsageError(
                f"{self.option} {self.amount.text} with method stack asks for {target} layers from "
                f"{layers}.",
                f"Stacking repeats the whole model: {2 * layers} (x2), {3 * layers} (x3) ...",
            )
        return self._repeat(list(range(layers)) * (target // layers))

    def _interpolate(self, layers: int, target: int) -> LayerMap:
        return self._repeat([int(i) for i in np.arange(target) * layers // target])

    def _solar(self, layers: int, target: int) -> LayerMap:
        overlap, odd = divmod(2 * layers - target, 2)
        if odd or not 0 <= overlap <= layers // 2 or target <= layers:
            raise UsageError(
                f"{self.option} {self.amount.text} with method solar asks for {target} layers from "
                f"{layers}.",
                f"Two overlapping copies of {layers} layers give an even number from "
                f"{layers + layers % 2 or 2} to {2 * layers}.",
            )
        keep = layers - overlap
        return self._repeat([*range(keep), *range(overlap, layers)])


def _deep_decoder_note(shape: ModelShape, stack: str, target: int) -> tuple[str, ...]:
    if stack != "decoder_layer" or target <= shape.sizes["layer"]:
        return ()
    return (
        f"{target} decoder layers are more than the {shape.sizes['layer']} of the encoder: "
        "generate() of transformers (5.23) makes a cache for as many layers as the encoder has and "
        "fails; pass past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()), or grow "
        "the encoder by --layers too",
    )


def _pattern_notes(shape: ModelShape, layers: LayerMap) -> tuple[str, ...]:
    """How a pattern of unlike layers (sliding and full attention, without RoPE) goes on."""
    notes = []
    for name in ("layer_types", "no_rope_layers"):
        values = shape.family.layer_list(shape.config, name, shape.sizes["layer"])
        if values is None or len(set(values)) == 1:
            continue
        after = Counter(str(values[layer.source]) for layer in layers)
        counts = ", ".join(f"{count} {kind}" for kind, count in after.items())
        notes.append(
            f"layers alternate: a new layer is of the kind of the layer that it copies, and "
            f"{name} in config.json lists them ({counts}); software that assumes a regular pattern "
            "instead of reading that list would compute another function"
        )
    return tuple(notes)
