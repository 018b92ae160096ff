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
``noise`` each carries r times its part of down_proj (:mod:`growkit.surgery.expert_share`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from growkit.errors import UsageError
from growkit.families.upcycling import UPCYCLINGS
from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.growth import Exactness, Growth, ModelShape

USUAL_PER_TOKEN = 2


@dataclass(frozen=True)
class Experts:
    """Grow the number of experts to ``amount``; a dense FFN counts as one.

    Attributes:
        amount: factor, increment or new number.
        per_token: experts that a token is routed to; None: 2 for a dense model, else as many times
            more as there are experts.
    """

    axis: ClassVar[str] = "expert"
    amount: Amount
    per_token: int | None = None

    def apply(self, shape: ModelShape) -> Growth:
        dense = "expert" not in shape.sizes
        experts = 1 if dense else shape.sizes["expert"]
        target = self.amount.resolve(experts, "--experts", "experts")
        if dense:
            return self._upcycled(shape, target)
        return self._more(shape, experts, target)

    def _upcycled(self, shape: ModelShape, target: int) -> Growth:
        upcycling = UPCYCLINGS.get(shape.family.name)
        if upcycling is None:
            raise UsageError(
                f"growkit knows no class of transformers that holds a {shape.family.name} model "
                "with experts.",
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
        per_token = self._checked(target, min(USUAL_PER_TOKEN, target))
        return Growth(
            operator="experts",
            summary=f"FFN -> {target} experts, {per_token} per token; new router",
            axes={"expert": AxisMap.tile(1, target)},
            sizes={
                "active_expert": per_token,
                "expert_layers": (1 << shape.sizes["layer"]) - 1,
                "fused_experts": 0,
                **upcycling.facts,
            },
            family=twin.name,
            exactness=Exactness.EXACT,
            reason="equal experts whose weights are renormalised to sum to one compute the FFN, "
            "whatever the router chooses (sparse upcycling, arXiv 2212.05055)",
            warnings=(
                "the experts are equal, and --symmetry does not change that: the random router "
                "sends them different tokens, so training makes them different",
                *(_ONE_PER_TOKEN if per_token == 1 else ()),
            ),
        )

    def _more(self, shape: ModelShape, experts: int, target: int) -> Growth:
        before = shape.sizes["active_expert"]
        copies, uneven = divmod(target, experts)
        per_token = self._checked(target, before if uneven else before * copies)
        exact = not uneven and per_token == before * copies
        return Growth(
            operator="experts",
            summary=f"experts {experts} -> {target}, {before} -> {per_token} per token",
            axes={"expert": AxisMap(np.arange(target) % experts, experts)},
            sizes={"active_expert": per_token},
            expert_copies=copies if exact else 1,
            exactness=Exactness.EXACT if exact else Exactness.NOT_EXACT,
            reason="the copies of an expert divide its probability, and top-k grows with them"
            if exact
            else "another set of experts is chosen, or with other weights",
            warnings=_warnings(experts, target, before, per_token),
        )

    def _checked(self, experts: int, usual: int) -> int:
        per_token = usual if self.per_token is None else self.per_token
        if not 1 <= per_token <= experts:
            raise UsageError(
                f"--experts-per-token {per_token} of {experts} experts.",
                f"Give a number from 1 to {experts}.",
            )
        return per_token


_ONE_PER_TOKEN = (
    "with one expert per token its renormalised weight is always 1: the router gets no gradient "
    "from the language-model loss, only from the auxiliary loss (output_router_logits)",
)


def _warnings(experts: int, target: int, before: int, after: int) -> tuple[str, ...]:
    copies, uneven = divmod(target, experts)
    if uneven:
        whole = f"{experts * copies} or {experts * (copies + 1)}" if copies > 1 else 2 * experts
        return (
            f"{target} experts are not a whole multiple of {experts}: an expert with more copies "
            "gets more probability, so the function changes; it is exact with "
            f"{whole} experts",
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
