"""Depth: what new layers begin as (``--new-layers``), exact and not.

* identity (LLaMA Pro, arXiv 2401.02415): a copy of a layer whose residual-writing projections are
  zero adds exactly nothing under any pre-norm: bit-exact. Where a class has layers of several kinds
  in an order of its own, identity layers are placed so that the order continues
  (:mod:`growkit.surgery.layer_pattern`).
* random: layers from scratch in the same places, as the class starts them (``initializer_range``,
  gains of one), what they write to the residual stream times 1 / sqrt(2 L) with L the new depth
  (:func:`growkit.surgery.plan_builder.residual_scale`). Not exact, and hardly a jump: a new block
  writes little. Numbers are keyed by seed and tensor name, so shards and threads change no byte.
* aligned: between two neighbours, their mean after their units are matched
  (:mod:`growkit.surgery.aligned_layers`, after OpT-DeUS, arXiv 2508.08011). Not exact.
* copy, of old called stack (G_stack, arXiv 2405.15319): layers 1..L repeated, 0 1 0 1. Not exact.
* interposed, of old interpolate (LiGO; orthogonal growth, arXiv 2510.08008): every layer's copies
  beside it, 0 0 1 1. Not exact.
* solar (arXiv 2312.15166): two copies of L layers, the last m of the first and the first m of the
  second dropped. Not exact.

Zero/one-layer expansion (arXiv 2511.04981) trains a model of 0 or 1 layers for most of a run and
grows it once by ``random`` or ``copy``. A model of no layers has nothing to copy: its identity and
random layers begin from scratch, in the shapes that its config.json says.

Where lambda_init depends on the layer index (DiffLlama, Motif) the plan moves lambda and
(1 - lambda_init) so that both keep their values (docs/algebra.md section 7); a layer from scratch
has the lambda_init that the class gives to its index.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from growkit.core.errors import UsageError
from growkit.surgery.amount import Amount
from growkit.surgery.effect import (
    NO_LAYER,
    Effect,
    Exactness,
    LayerMap,
    LayerSource,
    ModelShape,
    require_axis,
)
from growkit.surgery.layer_pattern import follows_rule, pattern_layers, pattern_notes
from growkit.surgery.operators import OperatorRow
from growkit.surgery.operators.slices import Slice, layers_of
from growkit.surgery.request import GrowthRequest

PLACEMENTS = ("auto", "even", "end", "pattern")
INSERTED = ("identity", "random", "aligned")
OLDER_NAMES = {"copy": "stack", "interposed": "interpolate"}
REASONS = {
    "identity": "inserted blocks write zero to the residual stream (LLaMA Pro, arXiv 2401.02415)",
    "random": "new layers begin as the class starts them, what they write times 1/sqrt(2 layers) "
    "(arXiv 2511.04981): another function, close to the old one, to be trained",
    "aligned": "new layers are the mean of two neighbours whose units were matched (after "
    "OpT-DeUS, arXiv 2508.08011): another function, to be trained",
}

POST_NORM = (
    "a block of zeros leaves what is normalised already as it is (post-norm): its norms begin with "
    "gains of one, and the last one has the numbers of the norm in front; equal but for one epsilon"
)


@dataclass(frozen=True)
class Depth:
    """Grow the number of layers of one stack to ``amount``. Its first layer stays the first.

    Attributes:
        amount: factor, increment or new number of layers.
        method: ``identity``, ``random``, ``aligned``, ``copy``, ``interposed`` or ``solar``.
        fresh_state: copies begin without optimizer state.
        placement: where identity and random layers go: ``even``ly, at the ``end``, as the class's
            ``pattern`` of layer kinds wants, or after the old layers with the given 0-based
            indices. ``auto``: by the pattern where one can be kept that ``even`` breaks, else
            evenly.
        stack: the axis that counts the layers: ``layer``, or ``decoder_layer`` of an
            encoder-decoder, whose ``layer`` counts the encoder's.
    """

    amount: Amount
    method: str = "identity"
    placement: str | tuple[int, ...] = "auto"
    stack: str = "layer"
    fresh_state: bool = False

    @property
    def axis(self) -> str:
        """What it grows."""
        return self.stack

    @property
    def option(self) -> str:
        return f"--{self.stack.replace('_', '-')}s"

    def apply(self, shape: ModelShape) -> Effect:
        require_axis(shape, self.stack, self.option)
        layers = shape.sizes[self.stack]
        label = "layers"
        if len(shape.family.stacks) > 1:
            label = "encoder layers" if self.stack == "layer" else "decoder layers"
        target = self.amount.resolve(layers, self.option, label)
        first = shape.family.first_copied.get(self.stack, 0)
        exact = self.method == "identity"
        passing = any(
            t.passes_on is not None for t in shape.family.tensors if t.stack == self.stack
        )
        same = Exactness.BIT_EXACT
        if shape.family.scaled_by_depth or passing:
            same = Exactness.EXACT
        if self.method == "random" or not layers:
            check_starts(shape, self.stack)
        if not layers:
            sources, by_rule = self._from_nothing(target), True
        elif self.method in INSERTED:
            sources, by_rule = self._inserted(shape, layers, target)
        else:
            sources, by_rule = self._slices(layers, target), False
        if first:
            sources = _of_a_kind(sources, first)
        if layers and self.stack == "layer":
            self._check_period(shape, sources)
        if passing:
            self._check_behind(shape, sources)
        return Effect(
            operator=f"{self.stack}s",
            summary=f"{label} {layers} -> {target} ({self.method}"
            + (f"; the order of layer kinds of {shape.family.name} goes on)" if by_rule else ")"),
            stacks={self.stack: sources},
            kinds_by_rule=by_rule,
            fresh_state=self.fresh_state,
            exactness=same if exact else Exactness.NOT_EXACT,
            reason=(POST_NORM if passing and exact else REASONS.get(self.method))
            or f"{self.method} repeats computing layers: another function, to be trained",
            warnings=(
                *(() if exact else (f"depth method {self.method} does not keep the function",)),
                *(pattern_notes(shape, sources) if self.stack == "layer" and not by_rule else ()),
                *_deep_decoder_note(shape, self.stack, target),
            ),
        )

    def _from_nothing(self, target: int) -> LayerMap:
        """The layers of a model that had none: nothing to copy, so they start from scratch."""
        if self.method not in ("identity", "random"):
            raise UsageError(
                f"{self.option} {self.amount.text} by {self.method} repeats layers, and the "
                "checkpoint has none.",
                "Give --new-layers random, or identity.",
            )
        return (LayerSource(NO_LAYER, "identity" if self.method == "identity" else "new"),) * target

    def _inserted(self, shape: ModelShape, layers: int, target: int) -> tuple[LayerMap, bool]:
        """Old layers and new ones between them, and whether the class's order of kinds decided
        about their places."""
        found, by_rule = self._placed(shape, layers, target)
        if self.method == "random":
            found = tuple(
                LayerSource(layer.source, "new") if layer.kind == "identity" else layer
                for layer in found
            )
        elif self.method == "aligned":
            found = tuple(
                _between(layer.source, layers) if layer.kind == "identity" else layer
                for layer in found
            )
        return found, by_rule

    def _placed(self, shape: ModelShape, layers: int, target: int) -> tuple[LayerMap, bool]:
        period = shape.family.layer_period if self.stack == "layer" else 1
        if period > 1 and self.placement in PLACEMENTS:
            return self._in_periods(shape, layers, target, period), True
        even = self._after(self._insert_after(layers, target - layers), layers)
        if self.placement not in ("auto", "pattern") or self.stack != "layer":
            return even, False
        if self.placement == "auto" and follows_rule(shape, even):
            return even, False
        found = pattern_layers(shape, even)
        if found is None and self.placement == "pattern":
            raise UsageError(
                f"--layer-placement pattern: no placement of {target - layers} new layers keeps "
                f"an order of layer kinds in this {shape.family.name} checkpoint.",
                "Leave --layer-placement out: new layers are spread evenly.",
            )
        return (even, False) if found is None else (found, True)

    def _in_periods(self, shape: ModelShape, layers: int, target: int, period: int) -> LayerMap:
        """Whole periods of layers, each behind the one that it copies: where nothing in the config
        but a layer's index says of which kind it is."""
        groups, whole = layers // period, (target - layers) // period
        if (target - layers) % period or not groups:
            raise UsageError(
                f"{self.option} {self.amount.text} adds {target - layers} layers to {layers}, and "
                f"{shape.family.name} has its kinds of layers in an order of {period} that config."
                "json cannot change.",
                f"Add a multiple of {period} layers.",
            )
        end = self.placement == "end"
        behind = Counter(groups - 1 if end else (i * groups) // whole for i in range(whole))
        result: list[LayerSource] = []
        for group in range(groups):
            here = range(group * period, (group + 1) * period)
            result += [LayerSource(layer, "kept") for layer in here]
            result += [LayerSource(layer, "identity") for layer in here] * behind[group]
        result += [LayerSource(layer, "kept") for layer in range(groups * period, layers)]
        return tuple(result)

    def _check_period(self, shape: ModelShape, sources: LayerMap) -> None:
        """Raise unless every layer is made of one of its kind, where its index alone says that."""
        period = shape.family.layer_period
        for place, layer in enumerate(sources):
            partner = layer.source if layer.partner < 0 else layer.partner
            if (place - layer.source) % period or (partner - layer.source) % period:
                raise UsageError(
                    f"{self.option} {self.amount.text} would make layer {place} of layer "
                    f"{layer.source}, and {shape.family.name} has its kinds of layers in an order "
                    f"of {period} that config.json cannot change.",
                    f"Add a multiple of {period} layers, by --new-layers identity or random, and "
                    "leave out --layer-placement.",
                )

    def _check_behind(self, shape: ModelShape, sources: LayerMap) -> None:
        """Raise unless identity layers stand behind the layer that they copy: its last norm passes
        its numbers on to them."""
        for place, layer in enumerate(sources):
            before = sources[place - 1].source if place else NO_LAYER
            if layer.kind == "identity" and (layer.source != before or before == NO_LAYER):
                raise UsageError(
                    f"{self.option} {self.amount.text} would put an identity layer where none can "
                    f"be: {shape.family.name} normalises the residual stream itself.",
                    "Leave --layer-placement out, or give --new-layers random.",
                )

    @staticmethod
    def _after(after: list[int], layers: int) -> LayerMap:
        """Identity blocks after the old layers with these indices."""
        blocks = Counter(after)
        result: list[LayerSource] = []
        for layer in range(layers):
            result.append(LayerSource(layer, "kept"))
            result.extend([LayerSource(layer, "identity")] * blocks[layer])
        return tuple(result)

    def _insert_after(self, layers: int, added: int) -> list[int]:
        if self.placement == "end":
            return [layers - 1] * added
        if self.placement in ("auto", "even", "pattern"):
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

    def _slices(self, layers: int, target: int) -> LayerMap:
        slices = {
            "stack": self._stack,
            "copy": self._cycle,
            "interpolate": self._interpolate,
            "interposed": self._interpolate,
            "solar": self._solar,
        }
        return layers_of(slices[self.method](layers, target))

    def _stack(self, layers: int, target: int) -> list[Slice]:
        if target % layers:
            raise UsageError(
                f"{self.option} {self.amount.text} with method stack asks for {target} layers from "
                f"{layers}.",
                f"Stacking repeats the whole model: {2 * layers} (x2), {3 * layers} (x3) ...",
            )
        return [(0, layers)] * (target // layers)

    def _cycle(self, layers: int, target: int) -> list[Slice]:
        return [(place % layers, place % layers + 1) for place in range(target)]

    def _interpolate(self, layers: int, target: int) -> list[Slice]:
        return [(int(i), int(i) + 1) for i in np.arange(target) * layers // target]

    def _solar(self, layers: int, target: int) -> list[Slice]:
        overlap, odd = divmod(2 * layers - target, 2)
        if odd or not 0 <= overlap <= layers // 2 or target <= layers:
            raise UsageError(
                f"{self.option} {self.amount.text} with method solar asks for {target} layers from "
                f"{layers}.",
                f"Two overlapping copies of {layers} layers give an even number from "
                f"{layers + layers % 2 or 2} to {2 * layers}.",
            )
        keep = layers - overlap
        return [(0, keep), (overlap, layers)]


def _of_a_kind(sources: LayerMap, first: int) -> LayerMap:
    """New layers that would copy one before ``first``, whose kind only the beginning has, copy the
    first that is like the others."""
    return tuple(
        replace(layer, source=first) if place >= first > layer.source >= 0 else layer
        for place, layer in enumerate(sources)
    )


def _between(layer: int, layers: int) -> LayerSource:
    """A layer made of this one and the next (of the last one and the one before)."""
    if layers < 2:
        raise UsageError(
            "--new-layers aligned averages two neighbours, and the checkpoint has 1 layer.",
            "Give --new-layers copy or random.",
        )
    partner = layer + 1 if layer + 1 < layers else layer - 1
    return LayerSource(layer, "aligned", partner)


def check_starts(shape: ModelShape, stack: str) -> None:
    """Raise UsageError where the class starts a tensor of a layer in a way of its own."""
    for tensor in shape.family.present(shape.sizes):
        if tensor.own_start and tensor.per_layer and tensor.stack == stack:
            raise UsageError(
                f"growkit does not know how the {shape.family.name} class starts {tensor.role!r}, "
                "so no layer of it can be made from scratch.",
                "Give --new-layers identity, copy or interposed, from a model of 1 layer or more.",
            )


def _deep_decoder_note(shape: ModelShape, stack: str, target: int) -> tuple[str, ...]:
    if stack != "decoder_layer" or target <= shape.sizes["layer"]:
        return ()
    return (
        f"{target} decoder layers are more than the {shape.sizes['layer']} of the encoder: "
        "generate() of transformers (5.23) makes a cache for as many layers as the encoder has and "
        "fails; pass past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()), or grow "
        "the encoder by --layers too",
    )


def make(row: OperatorRow, amount: Amount, request: GrowthRequest) -> Depth:
    """By ``new_layers``, or by its older name.

    Raises:
        UsageError: the two say different things.
    """
    method, older = request.new_layers or request.depth_method, request.depth_method
    if request.new_layers and older not in ("identity", OLDER_NAMES.get(method, method)):
        raise UsageError(
            f"--new-layers {method} and --depth-method {older} say different things.",
            "Give --new-layers alone.",
        )
    if request.warm_start and method == "identity":
        if request.new_layers:
            raise UsageError(
                "--new-layers identity keeps the function, and --warm-start does not.",
                "Leave one of them out: with --warm-start new layers are a start from scratch.",
            )
        method = "random"
    placement = read_placement(request.layer_placement)
    return Depth(amount, method, placement, row.axis, fresh_state=request.new_layers is not None)


def read_placement(text: str) -> str | tuple[int, ...]:
    """``--layer-placement`` read: a word, or the indices of layers."""
    if text in PLACEMENTS:
        return text
    try:
        return tuple(int(part) for part in text.strip("[]").split(","))
    except ValueError:
        raise UsageError(
            f"--layer-placement {text!r} is not known.",
            f"Valid values: {', '.join(PLACEMENTS)}, or layer indices such as 3,7,11.",
        ) from None
