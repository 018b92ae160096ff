"""What becomes of the optimizer state of every written tensor, decided from the plan alone.

If the function is unchanged, the gradient of a grown tensor is

    (factor on its upstream gradient) x (factor on its input)

times the old one, entry by entry: a dimension that *produces* a copied axis brings the part of the
gradient that each copy gets (:mod:`growkit.optimizer_state.axis_factors`), one that *reads* it
brings 1, and a weight that was multiplied by c brings 1 / c. First moments (AdamW's ``exp_avg``,
Muon's and SGD's ``momentum_buffer``) are linear in the gradient, second moments (``exp_avg_sq``)
quadratic. New units begin with zero moments and the old step counter, as in MSG (arXiv:2305.02869);
tensors without a source and inserted layers begin without any state.

docs/algebra.md section 10 has the rule; staged training (arXiv:2203.06211) does the same for its
two operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from growkit.families.differential import LAMBDA_ROLES
from growkit.optimizer_state.axis_factors import axis_factors, mean_squares
from growkit.surgery.axis_map import NEW
from growkit.surgery.dim_map import DimMap
from growkit.surgery.effect import Exactness, Fill
from growkit.surgery.lambdas import LambdaChange, change_lambda
from growkit.surgery.plan import Plan
from growkit.surgery.tensor_plans import Action, TensorPlan

Floats = npt.NDArray[np.float64]
LAYER_COPY = "the layer is a further copy: its gradients are those of another place"
MEAN_CHANNELS = "new channels hold the mean of the old ones and take a part of their gradient"
IDENTITY = "its layer is new and begins as the identity"
# Why a tensor begins without state, where what is done for it says so.
WITHOUT_STATE = {
    Action.NEW: "it has no source",
    Action.ZERO: IDENTITY,
    Action.CLOSED: IDENTITY,
}
WARM_START = "a warm start shrinks and perturbs the weights that its moments belong to"
NOT_PRESERVED = "the growth does not keep the function"


_Kind = tuple[str, tuple[DimMap | None, ...]]


@dataclass(frozen=True)
class DimRule:
    """Factors of one dimension.

    Attributes:
        map: where its units come from.
        mean: factor on a first moment, one per unit; 0 for new units.
        square: factor on a second moment.
    """

    map: DimMap
    mean: Floats
    square: Floats


@dataclass(frozen=True)
class StateRule:
    """How the optimizer state of one written tensor is made.

    Attributes:
        tensor: its plan.
        source: parameter whose state it is made of; None: it begins without any.
        dims: factors of each dimension, None where nothing moves.
        mean, square: factors on the whole first and second moment.
        exact: the mapped moments are those that a run of the grown model would have.
        why: the reason when they are not, or why it begins without state.
    """

    tensor: TensorPlan
    source: str | None
    dims: tuple[DimRule | None, ...] = ()
    mean: float = 1.0
    square: float = 1.0
    exact: bool = True
    why: str = ""

    @property
    def action(self) -> str:
        """``copied``, ``grown``, ``rescaled`` or ``fresh``."""
        if self.source is None:
            return "fresh"
        if any(dim is not None for dim in self.dims):
            return "grown"
        return "copied" if self.mean == self.square == 1.0 else "rescaled"

    @property
    def gradient_scale(self) -> float | None:
        """Factor on the gradient of old entries, where it is one number for the whole tensor."""
        return self._uniform([(dim.map, dim.mean) for dim in self.dims if dim], self.mean)

    @property
    def weight_scale(self) -> float | None:
        """Size of the written weights over that of the old ones, where it is one number."""
        scales = []
        for dim in self.dims:
            if dim is not None:
                scale = np.ones(len(dim.map.source)) if dim.map.scale is None else dim.map.scale
                copies = np.maximum(dim.map.multiplicity, 1) if dim.map.consumes else 1
                scales.append((dim.map, scale / copies))
        share = self.tensor.share
        return self._uniform(scales, self.tensor.factor / (share.copies if share else 1))

    def _uniform(self, parts: list[tuple[DimMap, Floats]], factor: float) -> float | None:
        if self.source is None:
            return None
        for dim_map, values in parts:
            known = np.unique(values[dim_map.source != NEW])
            if len(known) > 1:
                return None
            factor *= float(known[0]) if len(known) else 1.0
        return factor

    def same_dynamics(self) -> dict[str, float] | None:
        """Factors under which AdamW moves the grown tensor as it would have moved the old one.

        A weight that is alpha times the old one has to move by alpha times the old step: learning
        rate x alpha, weight decay / alpha; with gradients gamma times the old ones, eps x gamma.
        None where they differ inside the tensor.
        """
        alpha, gamma = self.weight_scale, self.gradient_scale
        if alpha is None or not gamma:
            return None
        return {"learning_rate": alpha, "weight_decay": 1.0 / alpha, "eps": gamma}


def state_rules(plan: Plan) -> tuple[StateRule, ...]:
    """One rule for every written tensor, in writing order.

    Reads nothing but the vectors of a lambda that changes. Exact, for a plan that keeps the
    function: everything under ``even`` shares except key/value and noise heads that grow by
    themselves; under ``split`` and ``noise`` everything but the producers of copied axes.
    """
    return tuple(_Builder(plan).rules())


class _Builder:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.axes = plan, axis_factors(plan)
        self._dims: dict[_Kind, tuple[DimRule | None, ...]] = {}
        self._whys: dict[_Kind, tuple[str, ...]] = {}
        self.readers = Counter(
            t.source for t in plan.tensors if t.source is not None and not t.in_new_layer
        )

    def rules(self) -> Iterator[StateRule]:
        for tensor in self.plan.tensors:
            yield self._rule(tensor)

    def _rule(self, tensor: TensorPlan) -> StateRule:
        why = WITHOUT_STATE.get(tensor.action, "")
        if tensor.layer_source is not None and tensor.layer_source.kind == "identity":
            why = why or IDENTITY
        elif tensor.in_new_layer and self.plan.growth.fresh_state:
            why = why or "its layer is new"
        if self.plan.growth.warm_start is not None:
            why = WARM_START
        if why or tensor.source is None:
            return StateRule(tensor, None, why=why)
        if tensor.redrawn and tensor.expert is not None:
            return StateRule(tensor, None, why="a part of its units is drawn anew")
        key = tensor.role, tensor.dims
        if key not in self._dims:
            self._dims[key], self._whys[key] = self._dims_of(tensor)
        dims, whys = self._dims[key], list(self._whys[key])
        factor = tensor.factor
        if tensor.share is not None:
            factor /= tensor.share.copies  # together with the part of the weight, see below
        mean, square = 1.0 / factor, factor**-2.0
        if tensor.lambda_change is not None:
            mean, known = self._lambda_factor(tensor, tensor.lambda_change)
            square = mean**2
            if not known:
                whys.append("the gradient of this lambda vector depends on one that was moved")
        copies = self.plan.growth.expert_copies
        readers, part = self._readers(tensor)
        mean, square = mean * part, square * part**2
        if copies > 1 and (tensor.share is not None or tensor.expert is not None):
            dims, mean, square = self._of_expert(tensor, dims, mean, square, whys)
        elif readers > 1:
            # Only the sum of the gradients is known; parts that come from different places of
            # the model are hardly correlated, so their squares add up too.
            mean, square = mean / readers, square / readers
            whys.append(f"{tensor.source} becomes {readers} tensors; only their sum is known")
        if tensor.in_new_layer:
            whys.append(LAYER_COPY)
        elif self.plan.exactness is Exactness.NOT_EXACT:
            whys.append(NOT_PRESERVED)
        why = "; ".join(dict.fromkeys(whys))
        return StateRule(tensor, tensor.source, dims, mean, square, not why, why)

    def _readers(self, tensor: TensorPlan) -> tuple[int, float]:
        """How many written tensors have the entries of this one's source, and the part of the
        function that they compute together."""
        assert tensor.source is not None
        split = self.plan.growth.split
        if split is not None and tensor.expert is not None:
            return self.plan.sizes["expert"] // split.parts, split.routed
        if split is not None and tensor.role.startswith("shared_"):
            return 1, split.shared
        if tensor.role in self.plan.growth.fused:  # its source has other matrices too
            return self.plan.sizes["expert"] if tensor.expert is not None else 1, 1.0
        return self.readers.get(tensor.source, 1), 1.0

    def _dims_of(self, tensor: TensorPlan) -> tuple[tuple[DimRule | None, ...], tuple[str, ...]]:
        """Factors of the dimensions of every tensor of this role, and why they are estimates."""
        declared = self.plan.family.tensor(tensor.role)
        assert declared is not None
        rules: list[DimRule | None] = []
        whys: list[str] = []
        for dim, dim_map in zip(declared.dims, tensor.dims, strict=True):
            if dim_map is None:
                rules.append(None)
                continue
            mean = (dim_map.source != NEW).astype(np.float64)
            square = mean.copy()
            if not dim_map.consumes:
                units = dim.layout(self.plan.sizes)
                inside = units.block // dim_map.block  # where channels inside a head grow
                for code, axis in enumerate(units.axes):
                    factors = self.axes.get(axis)
                    if factors is None:
                        continue
                    here, index = np.repeat(units.axis == code, inside), units.index
                    index = np.repeat(index, inside)[here]
                    mean[here] *= factors.mean[index]
                    square[here] *= factors.square[index]
                    if not factors.exact:
                        whys.append(factors.why)
                if Fill.MEAN in dim_map.fills:
                    whys.append(MEAN_CHANNELS)
            if dim_map.scale is not None:
                mean, square = mean / dim_map.scale, square / dim_map.scale**2
            rules.append(DimRule(dim_map, mean, square))
        return tuple(rules), tuple(dict.fromkeys(whys))

    def _of_expert(
        self,
        tensor: TensorPlan,
        dims: tuple[DimRule | None, ...],
        mean: float,
        square: float,
        whys: list[str],
    ) -> tuple[tuple[DimRule | None, ...], float, float]:
        """Copies of an expert that are always chosen together, each at 1 / copies of its weight.

        Copy j carries copies x s_j of the output weight W, so its inputs get s_j of the gradient;
        W's own gradient is 1 / copies of the old one, whatever s_j is.
        """
        copies, symmetry = self.plan.growth.expert_copies, self.plan.symmetry
        writes = tensor.share is not None
        if tensor.expert is None:  # a stack [experts, rows, columns]: its first dimension says it
            stack = dims[0]
            if writes and stack is not None:
                even = np.full(len(stack.mean), 1.0 / copies)
                dims = (DimRule(stack.map, even, even**2), *dims[1:])
                whys[:] = [why for why in whys if not why.startswith("expert ")]
            return dims, mean, square
        if writes or symmetry.equal:
            return dims, mean / copies, square / copies**2
        rank = int(self.plan.growth.axes["expert"].rank[tensor.expert])
        whys.append(f"expert copies share by {symmetry.mode}, each entry in its own way")
        return dims, mean / copies, square * float(mean_squares(copies, symmetry)[rank])

    def _lambda_factor(self, tensor: TensorPlan, change: LambdaChange) -> tuple[float, bool]:
        """Factor on the gradient of a lambda vector, and whether it is exact.

        d lambda / d lq1 = e^a lk1 with a = lq1 . lk1 (the second pair alike); a signal head that
        subtracts m copies of its noise map gives lambda m times the gradient.
        """
        assert tensor.source is not None
        base = tensor.source.removesuffix(tensor.role)
        vectors = [
            np.asarray(self.plan.checkpoint.read(base + role), np.float64) for role in LAMBDA_ROLES
        ]
        q1, k1, q2, k2 = vectors
        moved = [np.asarray(v, np.float64) for v in change_lambda(q1, k1, q2, k2, change)]
        query, key = (0, 1) if tensor.role in LAMBDA_ROLES[:2] else (2, 3)
        exponent = moved[query] @ moved[key] - vectors[query] @ vectors[key]
        partner = key if tensor.role == LAMBDA_ROLES[query] else query
        unmoved = np.allclose(moved[partner], vectors[partner], rtol=1e-6, atol=0.0)
        return float(change.noise_copies * np.exp(exponent)), unmoved
