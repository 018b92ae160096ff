"""Memory of one training process without activations, as a sum over tensors; no torch.

For a tensor of n entries in a dtype of b bytes (lambda vectors: 4)::

    weights      n b
    gradients    n b                  where anything of it is trained
    optimizer    2 n b + 4            AdamW: two moments and a step counter
                 n b                  Muon (hidden matrices): one momentum

DDP keeps the gradients a second time (its buckets). FSDP2 shards every tensor by its rows:
``ceil(rows / processes)`` of them are on the process that has most; while a layer computes it is
gathered whole, and the next one as well. bf16 autocast keeps a bfloat16 copy of the float32
matrices that a step has used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any, Literal

from growkit.families.differential import is_lambda, is_lambda_vector

Shape = tuple[int, ...]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "F32": 4, "F64": 8, "BF16": 2, "F16": 2}
STEP_COUNTER = 4


@dataclass(frozen=True)
class TrainingSetup:
    """What decides the memory of a run.

    Attributes:
        dtype: of the weights.
        optimizer: ``adamw`` or ``muon`` (hidden matrices; the rest has AdamW).
        bf16_autocast: bfloat16 arithmetic on float32 weights.
        strategy: ``ddp`` or ``fsdp``; of no effect with one process.
        processes: how many share the work.
        new_only: wholly old parameters are frozen all along.
    """

    dtype: str = "float32"
    optimizer: Literal["adamw", "muon"] = "adamw"
    bf16_autocast: bool = False
    strategy: Literal["ddp", "fsdp"] = "ddp"
    processes: int = 1
    new_only: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of the process that holds most.

    Attributes:
        weights, gradients, optimizer: held all the time.
        buckets: DDP's second copy of the gradients.
        gathered: the two largest layers that FSDP2 gathers at once (0 without it).
        autocast: bfloat16 copies of weights, at most.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int
    autocast: int

    @property
    def total(self) -> int:
        """The sum, which activations come on top of."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def training_memory(
    shapes: Mapping[str, Shape],
    new: Mapping[str, Any],
    setup: TrainingSetup,
    counts: Mapping[str, int] | None = None,
) -> Memory:
    """Bytes of one process.

    Args:
        shapes: every parameter once (a tied output projection is left out).
        new: the new-parameter map; of use where only new parameters are trained.
        counts: how many parameters an entry stands for, where it is not one.
    """
    counts = counts or {}
    width = BYTES[setup.dtype]
    sharded = setup.strategy == "fsdp" and setup.processes > 1
    weights = gradients = optimizer = autocast = 0
    for name, shape in shapes.items():
        count = counts.get(name, 1)
        entries = count * prod(_local(shape, setup.processes) if sharded else shape)
        size = entries * (4 if is_lambda_vector(name, len(shape)) else width)
        weights += size
        if setup.bf16_autocast and setup.dtype == "float32" and len(shape) > 1 and not sharded:
            autocast += entries * 2
        if setup.new_only and name not in new:
            continue
        gradients += size
        optimizer += size if _has_muon(name, shape, setup) else 2 * size + count * STEP_COUNTER
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buckets=gradients if setup.strategy == "ddp" and setup.processes > 1 else 0,
        gathered=_gathered(shapes, width, counts) if sharded else 0,
        autocast=autocast,
    )


def _local(shape: Shape, processes: int) -> Shape:
    return (ceil(shape[0] / processes), *shape[1:]) if shape else shape


def _has_muon(name: str, shape: Shape, setup: TrainingSetup) -> bool:
    if setup.optimizer != "muon" or len(shape) != 2 or is_lambda(name):
        return False
    # Experts are stacked in memory, which makes them no matrices.
    others = {"lm_head", "wte", "wpe", "shared", "experts"}
    parts = name.split(".")
    return not others & set(parts) and not any(part.startswith("embed") for part in parts)


def _gathered(shapes: Mapping[str, Shape], width: int, counts: Mapping[str, int]) -> int:
    """The two largest wrapped modules: layers, and what stands outside of them."""
    modules: dict[str, int] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        module = ".".join(parts[: index + 1]) if index is not None else ""
        modules[module] = modules.get(module, 0) + counts.get(name, 1) * prod(shape) * width
    return sum(sorted(modules.values())[-2:])
