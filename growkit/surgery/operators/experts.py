"""Experts: a dense FFN becomes a mixture of experts, or a mixture gets more of them.

Both classes choose the k experts of the highest softmax probability for each token and add their
outputs, weighted (transformers 5.23, ``models/{mixtral,qwen3_moe}``).

* Upcycling (arXiv 2212.05055): every expert is a copy of the FFN f, and the weights of the chosen k
  are renormalised to sum to one, so sum_e w_e f(x) = f(x) whatever the router says: exact with a
  random router, which is what makes the experts different, each from its own tokens. Mixtral always
  renormalises; a Qwen3-MoE is written with ``norm_topk_prob``.
* More experts, r copies of each with equal router rows: softmax gives every copy p / r, and the
  r k highest are all copies of the old k. Renormalised, the old weights return; without, the copies
  add up to p. Exact if and only if top-k grows with the copies: with k unchanged, k / r old experts
  would be left, and uneven copies raise the probability of some.

The copies are chosen together, so equal ones would stay equal for ever: with ``split`` and
``noise`` each carries r times its part of down_proj (:mod:`growkit.surgery.expand`).

* Narrower experts (virtual groups, arXiv 2410.07524): the FFN's units in ``parts`` runs, expert e
  has run e mod parts, and the experts of one group have equal router rows. Top-k of a multiple of
  ``parts`` chooses whole groups, each expert at p / parts, and down_proj carries ``parts`` times
  its columns: exact under the same condition, renormalised weights.
* A shared expert, which every token meets at sigmoid(g x): g = 0 makes that 1/2. With all units it
  and the routed experts compute half of the FFN each; with fewer it has them alone, and twice their
  output weight.

Where the copies are not chosen together, or not all (upcycling, top-k that does not grow), nothing
makes noise cancel: ``noise`` puts noise into each expert's down_proj that sums to zero over all the
experts made of one, and the function changes. So it does where a part of each new expert is drawn
anew (Drop-Upcycling, :mod:`growkit.surgery.new_weights`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from growkit.core.errors import UsageError
from growkit.families import Family
from growkit.families.upcycling import NO_TWIN, UPCYCLINGS, Upcycling
from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Alias, Effect, Exactness, FfnSplit, ModelShape
from growkit.surgery.operators import OperatorRow
from growkit.surgery.request import GrowthRequest
from growkit.surgery.symmetry import Symmetry

USUAL_PER_TOKEN = 2


@dataclass(frozen=True)
class Experts:
    """Grow the number of experts to ``amount``; a dense FFN counts as one.

    Attributes:
        amount: factor, increment or new number.
        per_token: experts that a token is routed to; None: 2 for a dense model, else as many times
            more as there are experts.
        symmetry: how copies are made to differ.
        layers: which layers of the written model get experts, as text; None: all. Of a dense model.
        reinit: part of each new expert's FFN units that is drawn anew.
        widened: the same plan grows what experts read, hold or write.
        ffn_grows: it grows the FFN.
        width: FFN units of an expert; None: all. Of a dense model.
        shared_width: FFN units of the shared expert; None: all. Of a dense model.
    """

    axis: ClassVar[str] = "expert"
    amount: Amount
    per_token: int | None = None
    symmetry: Symmetry = field(default_factory=Symmetry)
    reinit: float = 0.0
    widened: bool = False
    layers: str | None = None
    ffn_grows: bool = False
    width: int | None = None
    shared_width: int | None = None

    def apply(self, shape: ModelShape) -> Effect:
        dense = "expert" not in shape.sizes
        experts = 1 if dense else shape.sizes["expert"]
        target = self.amount.resolve(experts, "--experts", "experts")
        if self.reinit and self.widened:
            raise UsageError(
                f"--expert-reinit {self.reinit} draws units with the statistics of the old "
                "matrices, which --ffn and --hidden change in the same plan.",
                "Grow those first, in a growth of their own.",
            )
        if dense:
            return self._upcycled(shape, target)
        for flag, value in (
            ("--expert-layers", self.layers),
            ("--expert-width", self.width),
            ("--shared-expert-width", self.shared_width),
        ):
            if value is not None:
                raise UsageError(
                    f"{flag} {value}: the model has experts already, and keeps them as they are.",
                    "Leave it out; --experts gives every mixture more.",
                )
        return self._more(shape, experts, target)

    def _upcycled(self, shape: ModelShape, target: int) -> Effect:
        upcycling = UPCYCLINGS.get(shape.family.name)
        if upcycling is None or shape.family.origin:  # derived tables have roles of their own
            raise UsageError(
                f"growkit knows no class of transformers that holds a {shape.family.name} model "
                f"with experts{NO_TWIN.get(shape.family.name, '')}.",
                f"Dense families that can be given experts: {', '.join(UPCYCLINGS)}.",
            )
        twin = upcycling.target
        if objection := upcycling.objection(shape.config):
            raise UsageError(
                f"A {twin.name} model cannot hold this {shape.family.name} with experts: "
                f"{objection}.",
                "Grow it by other options, or start from a checkpoint without.",
            )
        if target < 2:
            raise UsageError(
                f"--experts {self.amount.text}: one expert is the FFN itself.",
                "Ask for 2 or more.",
            )
        split = self._split(shape, target, upcycling)
        parts = split.parts if split else 1
        per_token = self._checked(target, min(USUAL_PER_TOKEN * parts, target))
        if split is not None and per_token % parts:
            whole = range(parts, min(target, 4 * parts) + 1, parts)
            raise UsageError(
                f"--experts-per-token {per_token}: {parts} experts of {split.width} units have "
                "equal router rows and make one FFN, and a token would meet some of them by "
                "chance.",
                f"Ask for {' or '.join(map(str, whole))}.",
            )
        changed = self._changed(target // parts)
        layers = shape.sizes["layer"]
        chosen = self._chosen(layers, twin)
        partly = len(chosen) < layers
        where = f" in {len(chosen)} of {layers} layers" if partly else ""
        return Effect(
            operator="experts",
            summary=f"FFN -> {target} experts{_told(split)}, {per_token} per token{where}; "
            "new router",
            axes={"expert": AxisMap.tile(1, target)},
            sizes={
                "active_expert": per_token,
                "expert_layers": sum(1 << layer for layer in chosen),
                "fused_experts": 0,
                **({"dense_ffn": shape.sizes["ffn"]} if partly else {}),
                **({"ffn": split.width} if split else {}),
                **({"ffn_shared": self._shared(shape)} if upcycling.shared else {}),
                **upcycling.facts,
            },
            aliases={
                axis: Alias("ffn")
                for axis, here in (("dense_ffn", partly), ("ffn_shared", upcycling.shared))
                if here
            },
            family=twin.name,
            split=split,
            fused=upcycling.fused,
            noisy_experts=target // parts if self._noisy else 1,
            expert_reinit=self.reinit,
            exactness=Exactness.NOT_EXACT if changed else Exactness.EXACT,
            reason=changed
            or _REASONS[0 if parts == 1 else 1] + (_HALF if upcycling.shared else ""),
            warnings=(
                *((f"not exact: {changed}",) if changed else _EQUAL if target > parts else ()),
                *(_ONE_PER_TOKEN if per_token == parts else ()),
                *_unbalanced({}),
            ),
        )

    def _split(self, shape: ModelShape, target: int, upcycling: Upcycling) -> FfnSplit | None:
        """Which units each expert gets; None: every one the whole FFN."""
        if self.width is None and self.shared_width is None and not upcycling.shared:
            return None
        units, family = shape.sizes["ffn"], shape.family.name
        if self.shared_width is not None and not upcycling.shared:
            raise UsageError(
                f"--shared-expert-width {self.shared_width}: a {upcycling.target.name} model has "
                "no shared expert.",
                "Leave it out; of the dense families, qwen2 gets one.",
            )
        if self.ffn_grows:
            raise UsageError(
                f"A {family} FFN would be dealt out to experts and widened by --ffn in one plan.",
                "Grow the FFN first, in a growth of its own.",
            )
        shared = self._shared(shape) if upcycling.shared else 0
        if shared > units:
            raise UsageError(
                f"--shared-expert-width {shared}: the FFN has {units} units.",
                f"Give at most {units}; --ffn, in a growth of its own, makes more.",
            )
        # A shared expert of all units halves the work with the others; a narrower one has its
        # units for itself.
        first = 0 if shared == units else shared
        routed = units - first
        width = routed if self.width is None else self.width
        if routed % width:
            near = [n for n in range(1, routed + 1) if not routed % n and n * 64 >= routed]
            raise UsageError(
                f"--expert-width {width} does not divide the {routed} FFN units of the routed "
                "experts.",
                f"Widths that do: {', '.join(map(str, near[-8:]))}.",
            )
        parts = routed // width
        if target % parts:
            raise UsageError(
                f"--experts {target}: {parts} experts of {width} units make one FFN, and {target} "
                "is no whole multiple.",
                f"Ask for {max(1, target // parts) * parts} or {(target // parts + 1) * parts}.",
            )
        if self.reinit and (parts > 1 or first):
            raise UsageError(
                f"--expert-reinit {self.reinit} draws units of whole FFNs anew, and an expert of "
                f"{width} units is a part of one.",
                "Leave one of the two out.",
            )
        half = 0.5 if shared == units else 1.0
        return FfnSplit(width, parts, first, half, half if shared else 0.0)

    def _shared(self, shape: ModelShape) -> int:
        return shape.sizes["ffn"] if self.shared_width is None else self.shared_width

    def _chosen(self, layers: int, twin: Family) -> list[int]:
        """The layers that get experts."""
        if self.layers is None:
            return list(range(layers))
        chosen = _layers_in(self.layers, layers)
        if len(chosen) < layers and twin.tensor("dense_gate") is None:
            raise UsageError(
                f"--expert-layers {self.layers}: {twin.name} has experts in every layer.",
                "Leave it out; of the dense families, qwen3 can have experts in some layers.",
            )
        if self.ffn_grows:
            raise UsageError(
                "--expert-layers and --ffn in one plan: layers with and without experts would "
                "have widths of their own.",
                "Grow the FFN first, in a growth of its own.",
            )
        return chosen

    def _more(self, shape: ModelShape, experts: int, target: int) -> Effect:
        before = shape.sizes["active_expert"]
        copies, uneven = divmod(target, experts)
        per_token = self._checked(target, before if uneven else before * copies)
        exact = not uneven and per_token == before * copies and not self.reinit
        if self._noisy and uneven:
            raise UsageError(
                f"--symmetry noise gives equal noise to the copies of every expert, and {target} "
                f"is no whole multiple of {experts}.",
                f"Ask for {_multiples(experts, target)} experts, or for --symmetry split.",
            )
        return Effect(
            operator="experts",
            summary=f"experts {experts} -> {target}, {before} -> {per_token} per token",
            axes={"expert": AxisMap(np.arange(target) % experts, experts)},
            sizes={"active_expert": per_token},
            expert_copies=copies if exact else 1,
            noisy_experts=copies if self._noisy and not exact else 1,
            expert_reinit=self.reinit,
            exactness=Exactness.EXACT if exact else Exactness.NOT_EXACT,
            reason="the copies of an expert divide its probability, and top-k grows with them"
            if exact
            else self._changed()
            if self.reinit
            else "another set of experts is chosen, or with other weights",
            warnings=_warnings(experts, target, before, per_token) + _unbalanced(shape.config),
        )

    @property
    def _noisy(self) -> bool:
        return self.symmetry.mode == "noise"

    def _changed(self, copies: int = 2) -> str:
        """Why experts made of one FFN no longer compute it; empty where they do."""
        if self.reinit:
            return (
                f"{self.reinit:.0%} of the FFN units of every new expert are drawn anew with the "
                "statistics of the old weights (Drop-Upcycling, arXiv 2502.19261)"
            )
        if self._noisy and copies > 1:
            return (
                f"noise {self.symmetry.noise_snr_db:g} dB below the weights sums to zero over all "
                "experts, not over those that a token is sent to"
            )
        return ""

    def _checked(self, experts: int, usual: int) -> int:
        per_token = usual if self.per_token is None else self.per_token
        if not 1 <= per_token <= experts:
            raise UsageError(
                f"--experts-per-token {per_token} of {experts} experts.",
                f"Give a number from 1 to {experts}.",
            )
        return per_token


def _told(split: FfnSplit | None) -> str:
    if split is None:
        return ""
    shared = " beside a shared one" if split.shared else ""
    return f" of {split.width} units{shared}" if split.parts > 1 or split.first else shared


_REASONS = (
    "equal experts whose weights are renormalised to sum to one compute the FFN, "
    "whatever the router chooses (sparse upcycling, arXiv 2212.05055)",
    "experts that have a part of the FFN each have equal router rows where they make it whole, so "
    "that it is chosen whole, each part at an equal weight that its output makes up for (virtual "
    "groups, arXiv 2410.07524)",
)
_HALF = "; the gate of the shared expert begins at a half, which its output makes up for"
_EQUAL = (
    "the experts begin equal, under --symmetry split and even alike: the random router sends them "
    "different tokens, so training makes them different from the first step on (--symmetry noise "
    "and --expert-reinit make them differ before it, and are not exact)",
)
_ONE_PER_TOKEN = (
    "with one expert per token (or one group that shares an FFN) its renormalised weight is always "
    "1: the router gets no gradient from the language-model loss, only from the auxiliary loss "
    "(training.router_aux_loss)",
)


def _unbalanced(config: Mapping[str, Any]) -> tuple[str, ...]:
    if config.get("output_router_logits"):
        return ()
    return (
        "the auxiliary loss that balances the experts is off in what is written "
        "(output_router_logits: false), and experts may starve: train with "
        "training.router_aux_loss: 0.01, or set output_router_logits in another trainer",
    )


def _multiples(experts: int, target: int) -> str:
    copies = target // experts
    return f"{experts * copies} or {experts * (copies + 1)}" if copies > 1 else f"{2 * experts}"


def _warnings(experts: int, target: int, before: int, after: int) -> tuple[str, ...]:
    copies, uneven = divmod(target, experts)
    if uneven:
        return (
            f"{target} experts are not a whole multiple of {experts}: an expert with more copies "
            "gets more probability, so the function changes; it is exact with "
            f"{_multiples(experts, target)} experts",
        )
    if after != before * copies:
        return (
            f"top-k {after} instead of {before * copies}: the copies of an expert take each "
            "other's places, so the function changes; leave --experts-per-token out",
        )
    if copies == 1:
        return ()
    return (
        f"every token meets {after} experts instead of {before}; the auxiliary load-balancing loss "
        f"of the same routing is {copies} times as large (router_aux_loss_coef is unchanged)",
    )


def _layers_in(text: str, layers: int) -> list[int]:
    """The layers that ``1,3,8-16`` names: indices, and ranges without their end."""
    chosen: set[int] = set()
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,6})(?:[-:](\d{1,6}))?", part)
        first, end = (
            (0, 0) if match is None else (int(match[1]), int(match[2] or int(match[1]) + 1))
        )
        if not first < end <= layers:
            raise UsageError(
                f"--expert-layers {text}: {part!r} is no layer, or range of layers, of 0 to "
                f"{layers - 1}.",
                f"Ranges are half-open: {layers // 2}-{layers} is the upper half.",
            )
        chosen |= set(range(first, end))
    return sorted(chosen)


def make(row: OperatorRow, amount: Amount, request: GrowthRequest) -> Experts:
    return Experts(
        amount,
        request.experts_per_token,
        request.symmetry_choice(),
        request.expert_reinit,
        widened=bool(request.ffn or request.hidden),
        layers=request.expert_layers,
        ffn_grows=bool(request.ffn),
        width=request.expert_width,
        shared_width=request.shared_expert_width,
    )


def grows(row: OperatorRow, shape: ModelShape) -> bool:
    family = shape.family
    return row.axis in shape.sizes or (family.name in UPCYCLINGS and not family.origin)
