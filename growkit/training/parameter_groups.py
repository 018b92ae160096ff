"""Which optimizer, decay and rate every parameter gets.

* Muon takes the hidden matrices; embeddings, output projection, vectors and everything of lambda go
  to AdamW (Jordan et al., kellerjordan.github.io/posts/muon; Liu et al., 2502.16982).
* Matrices decay; norms, biases and lambda vectors (one dimension) never do.
* lambda has a learning rate of its own.
* Old, new and mixed parameters stand in groups of their own.
"""

from __future__ import annotations

from typing import Any

import torch

from growkit.training.lambda_names import is_lambda
from growkit.training.recipe_training import TrainingSection
from growkit.training.slots import SlotMap


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


def parameter_groups(model: Any, section: TrainingSection, slots: SlotMap) -> list[dict[str, Any]]:
    """The groups that :class:`growkit.training.optimizer.GrowthOptimizer` takes.

    Parameters that need no gradient are left out. The order is fixed by the model's own order.
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
        key = (kind, slots.part(name), name in decays, lambdas)
        group = groups.setdefault(
            key,
            {
                "params": [],
                "kind": kind,
                "part": slots.part(name),
                "multiplier": multiplier,
                "weight_decay": section.weight_decay if name in decays else 0.0,
            },
        )
        group["params"].append((name, parameter))
    return list(groups.values())
