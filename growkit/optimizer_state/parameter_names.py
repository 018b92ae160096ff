"""From the positions under which torch stores optimizer state to parameter names.

``Optimizer.state_dict()`` numbers parameters through all groups. Their names are, in this order:

1. stored with the groups (``param_names``; growkit's own runs and named torch optimizers do);
2. those of a grouping that training scripts use, applied to the model's own order of parameters
   (tied weights once), if the numbers and all shapes agree: one group (the others empty);
   transformers' Trainer (decay and no decay); matrices and vectors, with or without embeddings
   among the matrices; the groups in either order;
3. decided by shapes alone, if no two groups hold parameters of one shape.

Anything else is refused: a guess would give a parameter the moments of another one. (A grouping
with the sizes and all shapes of a usual one cannot be told from it.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from growkit.core.errors import CheckpointError
from growkit.optimizer_state.source import RESET

Shape = tuple[int, ...]
Named = list[tuple[str, Shape]]
_WRAPPERS = re.compile(
    r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# transformers 5, Trainer.get_decay_parameter_names.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers (DDP, FSDP, torch.compile) put in it."""
    while True:
        shorter = _WRAPPERS.sub(r"\1", name)
        if shorter == name:
            return name
        name = shorter


def model_parameters(folder: Path, *, trust_remote_code: bool = False) -> Named:
    """Names and shapes in the order of ``named_parameters`` (tied weights once), without weights.

    Raises:
        CheckpointError: transformers cannot make the model.
    """
    model = empty_model(folder, trust_remote_code=trust_remote_code)
    return [(name, tuple(p.shape)) for name, p in model.named_parameters()]


def empty_model(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model of a folder, without memory.

    Raises:
        CheckpointError: transformers cannot make it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from growkit.verification.loading import quiet_transformers, reason, register_own_models

    register_own_models()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, **options)
            seq2seq = getattr(config, "is_encoder_decoder", False)
            auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
            model = auto.from_config(config, **options)
            model.tie_weights()
    except Exception as error:  # whatever transformers objects to
        raise CheckpointError(
            f"The order of the parameters of {folder.name!r} is not known, because transformers "
            f"cannot make the model: {reason(error)}.",
            f"Its optimizer state is stored by position alone. {RESET}",
        ) from error
    return model


def names_of_positions(
    groups: Sequence[Mapping[str, Any]],
    shapes: Mapping[int, Shape],
    parameters: Callable[[], Named],
    file: str,
) -> dict[int, str]:
    """Position -> name.

    Args:
        groups: ``param_groups`` of a state dict; their ``params`` are positions.
        shapes: shapes of the state, where there is any.
        parameters: gives the model's parameters; asked only when names are not stored.
        file: for errors.

    Raises:
        CheckpointError: the positions cannot be named with certainty.
    """
    stored = [group.get("param_names") for group in groups]
    if all(stored):
        return {
            position: plain_name(name)
            for group, names in zip(groups, stored, strict=True)
            for position, name in zip(group["params"], names or (), strict=True)
        }
    wanted = [list(group["params"]) for group in groups]
    named = parameters()
    found: dict[tuple[tuple[int, str], ...], dict[int, str]] = {}
    for candidate in _usual_groupings(named, len(wanted)):
        mapping = _match(wanted, candidate, shapes)
        if mapping is not None:
            found[tuple(sorted(mapping.items()))] = mapping
    if not found:
        mapping = _by_shape(wanted, named, shapes)
        if mapping is not None:
            return mapping
    if len(found) == 1:
        return next(iter(found.values()))
    counts = " + ".join(str(len(positions)) for positions in wanted)
    raise CheckpointError(
        f"{file!r} stores optimizer state by position, and its {counts} parameters can be assigned "
        f"to the {len(named)} of the model in {'several ways' if found else 'no known way'}.",
        "Save it with names (torch keeps them when the optimizer is made of named parameters), or "
        "grow without it: --optimizer-state reset.",
    )


def _usual_groupings(named: Named, groups: int) -> list[list[Named]]:
    """Every usual way to divide the parameters into so many groups."""
    rules: list[Callable[[str, Shape], bool]] = [
        lambda name, shape: not _NO_DECAY.search(name),
        lambda name, shape: True,
        lambda name, shape: len(shape) >= 2,
        lambda name, shape: len(shape) >= 2 and "embed" not in name,
        lambda name, shape: len(shape) >= 2 and "embed" not in name and "lm_head" not in name,
    ]
    if groups == 1:
        return [[named]]
    result = []
    for rule in rules:
        parts = [
            [item for item in named if rule(*item)],
            [item for item in named if not rule(*item)],
        ]
        if groups > 2:
            parts += [[] for _ in range(groups - 2)]
        result += [list(order) for order in permutations(parts)] if groups <= 3 else []
    return result


def _match(
    wanted: list[list[int]], candidate: list[Named], shapes: Mapping[int, Shape]
) -> dict[int, str] | None:
    mapping: dict[int, str] = {}
    for positions, members in zip(wanted, candidate, strict=True):
        if len(positions) != len(members):
            return None
        for position, (name, shape) in zip(positions, members, strict=True):
            if shapes.get(position, shape) != shape:
                return None
            mapping[position] = name
    return mapping


def _by_shape(
    wanted: list[list[int]], named: Named, shapes: Mapping[int, Shape]
) -> dict[int, str] | None:
    """Each shape stands in one group, complete, so the model's order decides."""
    positions = [position for group in wanted for position in group]
    if any(position not in shapes for position in positions):
        return None
    if Counter(shapes[p] for p in positions) != Counter(shape for _, shape in named):
        return None
    groups_of = {
        shape: {n for n, group in enumerate(wanted) if any(shapes[p] == shape for p in group)}
        for shape in {shape for _, shape in named}
    }
    if any(len(groups) > 1 for groups in groups_of.values()):
        return None
    mapping: dict[int, str] = {}
    for shape in groups_of:
        of_shape = [p for p in positions if shapes[p] == shape]
        mapping |= dict(zip(of_shape, (n for n, s in named if s == shape), strict=True))
    return mapping
