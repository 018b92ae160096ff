"""One optimizer for a grown model: AdamW, or Muon beside it, with a rate of its own for every slot.

The update of AdamW does not change when a gradient is scaled, so a learning rate inside a tensor
cannot be a gradient scale. What both optimizers do is, with u independent of the rate,

    w  <-  (1 - lr * weight_decay) * w - lr * u

so a mixed parameter takes *the library's own step at each of its two rates*, of which every entry
keeps the one that is meant for it; the moments, which no rate enters, advance once. Every slot is
therefore bit for bit what ``torch.optim.AdamW`` or ``torch.optim.Muon`` would have made of it at
its rate, decay included, and a frozen slot (rate 0) keeps its bytes under any optimizer and dtype.
Muon orthogonalises the momentum of the whole matrix, which has no old part where the old slots are
frozen (their gradient is zero: growth/trainer_hooks.py); each slot takes its entries of the result.

Parameter names are kept in ``param_groups[i]["param_names"]`` and are saved with the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from growkit.families.differential import is_lambda
from growkit.training.growth.rates import Rates
from growkit.training.growth.slots import EntrySlots, SlotMap, Slots, local
from growkit.training.muon import BatchedMuon
from growkit.training.rate_rule import Factors
from growkit.training.recipe_training import TrainingSection

Group = dict[str, Any]


def library_optimizer(kind: str, groups: Sequence[Group], section: TrainingSection) -> Optimizer:
    """torch's optimizer of a kind (``adamw`` or ``muon``) with the recipe's settings."""
    if kind == "muon":
        made: Optimizer = BatchedMuon(
            groups,
            lr=section.learning_rate,
            weight_decay=section.weight_decay,
            momentum=section.muon_momentum,
            adjust_lr_fn=section.muon_adjust,
        )
        return made
    return torch.optim.AdamW(
        groups,
        lr=section.learning_rate,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
        weight_decay=section.weight_decay,
        fused=True,
    )


class GrowthOptimizer(Optimizer):
    """AdamW and Muon as one torch optimizer with one state.

    Args:
        groups: each with ``params`` (pairs of name and parameter), ``kind`` (``adamw`` or
            ``muon``), ``part`` (``old``, ``new`` or ``mixed``), ``multiplier`` (of the learning
            rate) and ``weight_decay``. Their ``lr`` is the scheduled one, the same in every group.
        slots: the new rows and columns of the mixed parameters.
        rates: factors for old and new slots, asked at every step.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        section: TrainingSection,
        slots: SlotMap,
        rates: Callable[[], Rates],
    ) -> None:
        self._slots, self._rates = slots, rates
        self._local_slots: dict[str, Slots | EntrySlots] = {}
        # The library's classes fill in their defaults; the dicts then become this optimizer's.
        self._inner = {
            kind: library_optimizer(kind, [g for g in groups if g["kind"] == kind], section)
            for kind in sorted({group["kind"] for group in groups})
        }
        super().__init__(list(groups), {"lr": section.learning_rate})

    def mask(self, name: str, parameter: Tensor) -> Tensor:
        """The new entries of this process's part of a mixed parameter, bool of that shape."""
        found = self._local_slots.get(name)
        if found is None:
            found = self._local_slots[name] = self._slots.slots(name).local_to(parameter)
        return found.mask()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rates = self._rates()
        for kind, inner in self._inner.items():
            groups = [group for group in self.param_groups if group["kind"] == kind]
            inner.state = self.state
            whole = []
            for group in groups:
                part = group["part"]
                if part == "mixed" and rates.old != rates.new:
                    for name, parameter in zip(group["param_names"], group["params"], strict=True):
                        if parameter.grad is not None:
                            self._step_mixed(inner, group, name, parameter, rates)
                    continue
                factor = rates.new if part == "new" else rates.old
                if factor:
                    whole += [_at(group, same, factor) for same in _alike(group["params"])]
            _run(inner, whole)
        return loss

    def _step_mixed(
        self, inner: Optimizer, group: Group, name: str, parameter: Parameter, rates: Rates
    ) -> None:
        is_new = self.mask(name, parameter)
        if rates.old and rates.new:
            # The other rate is tried on a copy, with a copy of the state, which is then dropped.
            other = Parameter(parameter.detach().clone())
            other.grad = parameter.grad
            if parameter in self.state:
                self.state[other] = {
                    key: value.clone() if isinstance(value, Tensor) else value
                    for key, value in self.state[parameter].items()
                }
            _run(inner, [_at(group, [other], rates.new)])
            _run(inner, [_at(group, [parameter], rates.old)])
            del self.state[other]
            kept = torch.where(is_new, local(other), local(parameter))
        else:
            before = local(parameter.detach()).clone()
            _run(inner, [_at(group, [parameter], rates.old or rates.new)])
            frozen = is_new if rates.old else ~is_new
            kept = torch.where(frozen, before, local(parameter))
        local(parameter.detach()).copy_(kept)


def _at(group: Group, parameters: list[Parameter], factor: float) -> Group:
    rate = group["lr"] * group["multiplier"] * factor
    return {**group, "params": parameters, "lr": rate}


def _alike(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """What one call of a fused kernel may take: not tensors of several meshes, or of none."""
    found: dict[Any, list[Parameter]] = {}
    for parameter in parameters:
        found.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(found.values())


def _run(inner: Optimizer, groups: list[Group]) -> None:
    inner.param_groups = groups
    inner.step()


def outer_matrices(model: Any) -> set[int]:
    """Identities of the embedding's and the output projection's parameters."""
    modules = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {id(m.weight) for m in [*modules, *([] if head is None else [head])]}


def decaying(model: Any, section: TrainingSection) -> set[str]:
    """Names of the parameters that decay."""
    embeddings: set[int] = set()
    if not section.decay_embeddings:
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in embeddings
    }


def parameter_groups(
    model: Any,
    section: TrainingSection,
    slots: SlotMap,
    factors: Mapping[str, Factors] | None = None,
) -> list[dict[str, Any]]:
    """The groups that :class:`growkit.training.optimizer.GrowthOptimizer` takes.

    ``factors``: see :func:`growkit.training.rate_rule.rate_factors`. Parameters that need no
    gradient are left out. The order is fixed by the model's own order.
    """
    decays, outer = decaying(model, section), outer_matrices(model)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lambdas = is_lambda(name)
        hidden = parameter.ndim == 2 and id(parameter) not in outer and not lambdas
        kind = "muon" if section.optimizer == "muon" and hidden else "adamw"
        multiplier = 1.0
        if lambdas:
            multiplier = section.lambda_learning_rate_multiplier
        elif kind == "muon":
            multiplier = section.muon_learning_rate_multiplier
        factor = (factors or {}).get(name, Factors()).rate(kind)
        key = (kind, slots.part(name), name in decays, lambdas, factor)
        group = groups.setdefault(
            key,
            {
                "params": [],
                "kind": kind,
                "part": slots.part(name),
                "multiplier": multiplier * factor,
                # What decays a weight is rate x decay: the rule changes the rate alone.
                "weight_decay": section.weight_decay / factor if name in decays else 0.0,
            },
        )
        group["params"].append((name, parameter))
    return list(groups.values())
