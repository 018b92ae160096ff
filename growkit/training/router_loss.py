# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss that balances experts: it reaches the gradient, never the reported loss.

transformers makes it of the router's logits where ``output_router_logits`` asks for it (Switch
Transformer, arXiv:2101.03961, eq. 4-6)::

    aux = experts x sum_e (choices of e / tokens) x (mean probability of e)

over the tokens of all layers together. It is the number of experts per token where all experts are
used equally (twice that where half of them get everything), whatever the number of experts.

A class of transformers adds ``router_aux_loss_coef`` times it to ``loss``: that would make losses
of runs with and without it incomparable, and would count it once a micro-batch where the
language-model loss is divided among them. So the class's own coefficient is set to 0, and a term
of value zero carries the gradient.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from growkit.core.errors import UsageError
from growkit.training.parallel.processes import Processes
from growkit.training.recipe import Recipe

USUAL = 0.01


class RouterLoss:
    """Adds the auxiliary loss to the gradient, and keeps its mean between two log lines.

    Args:
        coefficient: weight of the auxiliary loss beside the language-model loss, above 0.
    """

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient
        self.sum, self.count = 0.0, 0
        self._pending: list[Tensor] = []

    def join(self, loss: Tensor, auxiliary: Tensor, parts: int) -> Tensor:
        """The language-model loss in value, with the gradient of both.

        Args:
            loss: of one micro-batch, a scalar.
            auxiliary: its auxiliary loss, a scalar.
            parts: micro-batches whose losses are added up to that of a step.
        """
        self._pending.append(auxiliary.detach())
        weighted = auxiliary.to(loss.device) * (self.coefficient / parts)
        return loss + (weighted - weighted.detach())

    def state(self) -> tuple[float, int]:
        """(sum of the auxiliary losses, how many) since the last log line."""
        self.sum += sum(float(value) for value in self._pending)
        self.count += len(self._pending)
        self._pending.clear()
        return self.sum, self.count

    def load(self, total: float, count: int) -> None:
        """Continue summing from what a checkpoint says."""
        self.sum, self.count = total, count
        self._pending.clear()

    def take(self, processes: Processes) -> float:
        """The mean over all micro-batches of all processes since the last call."""
        total, count = processes.sum([float(value) for value in self.state()])
        self.load(0.0, 0)
        return total / max(count, 1.0)


def has_routers(model: Any) -> bool:
    """The class of the model can make the auxiliary loss."""
    known = inspect.signature(model.forward).parameters
    return "output_router_logits" in known and hasattr(model, "router_aux_loss_coef")


def router_loss_of(model: Any, recipe: Recipe) -> RouterLoss | None:
    """What the recipe, or config.json where the recipe is silent, says; None where it is off.

    Raises:
        UsageError: a coefficient for a model without routers.
    """
    coefficient = recipe.training.router_aux_loss
    if not has_routers(model):
        if coefficient and recipe.position is None:  # a first stage may come before the experts
            raise UsageError(
                f"training.router_aux_loss is {coefficient}, and a {model.config.model_type} model "
                "has no auxiliary loss of routers in transformers.",
                "Leave the key out; growkit grow --experts makes models that have one.",
            )
        return None
    if coefficient is None and getattr(model.config, "output_router_logits", False):
        coefficient = float(model.router_aux_loss_coef)
    model.router_aux_loss_coef = 0.0
    return RouterLoss(coefficient) if coefficient else None


def unbalanced(model: Any) -> str:
    """What to say of a model with experts that is trained without the auxiliary loss."""
    return (
        f"The auxiliary loss that balances the experts of this {model.config.model_type} is off: "
        f"some may starve. training.router_aux_loss: {USUAL} switches it on (docs/experts.md)."
    )
