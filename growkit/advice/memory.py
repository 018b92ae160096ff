"""Memory of one training process, as a sum over tensors; no torch.

For a tensor of n entries in a dtype of b bytes (lambda vectors: 4)::

    weights      n b
    gradients    n b                  where anything of it is trained
    optimizer    2 n b + 4            AdamW: two moments and a step counter
                 n b                  Muon (hidden matrices): one momentum

DDP keeps the gradients a second time (its buckets). FSDP2 shards every tensor by its rows:
``ceil(rows / processes)`` of them are on the process that has most. In the backward pass, where it
takes most, it holds whole: what stands outside of the layers (embeddings, head, final norm), its
gradient, and of the largest layer the parameters, the gradients, what is scattered of them, and the
next layer's parameters on their way. bf16 autocast keeps a bfloat16 copy of the float32 matrices
that a step has used.

Tensor parallelism divides matrices first; its activations are counted as if it divided nothing.

Activations are those of a gated decoder with a fused attention kernel (:func:`activations`), for
the tokens of one forward pass. ``benchmarks/sharded_memory.json`` has what two processes took.
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
        tensor: how many of them share every layer; their matrices are taken to be split evenly.
        context: how many of them share every sequence; ``tokens`` are those of one process.
        new_only: wholly old parameters are frozen all along.
        tokens: of one forward pass of one process; 0: activations are not counted.
        checkpointing: activations are computed again in the backward pass.
    """

    dtype: str = "float32"
    optimizer: Literal["adamw", "muon"] = "adamw"
    bf16_autocast: bool = False
    strategy: Literal["ddp", "fsdp"] = "ddp"
    processes: int = 1
    tensor: int = 1
    context: int = 1
    new_only: bool = False
    tokens: int = 0
    checkpointing: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of the process that holds most.

    Attributes:
        weights, gradients, optimizer: held all the time.
        buckets: DDP's second copy of the gradients.
        gathered: the two largest layers that FSDP2 gathers at once (0 without it).
        scattered: whole gradients beside them, and the buffers that carry both (0 without it).
        autocast: bfloat16 copies of weights, at most.
        activations: of one forward pass, kept for the backward pass; 0 where they are not counted
            (mixtures, no number of tokens given).
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int
    autocast: int
    scattered: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """The sum, which activations come on top of."""
        return self.peak - self.activations

    @property
    def peak(self) -> int:
        """The sum with activations."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total, "peak": self.peak}


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
    readers = max(setup.processes // setup.tensor, 1)
    sharded = setup.strategy == "fsdp" and readers > 1
    whole = shapes
    if setup.tensor > 1:
        shapes = {n: _local(s, setup.tensor) if len(s) > 1 else s for n, s in shapes.items()}
    weights = gradients = optimizer = autocast = 0
    for name, shape in shapes.items():
        count = counts.get(name, 1)
        entries = count * prod(_local(shape, readers) if sharded else shape)
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
        buckets=gradients if setup.strategy == "ddp" and readers > 1 else 0,
        gathered=_gathered(shapes, width, counts) if sharded else 0,
        autocast=autocast,
        scattered=_scattered(shapes, width, counts) if sharded else 0,
        activations=activations(whole, setup),
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


def _modules(shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    """Names of parameters by the layer that they stand in; "": outside of the layers."""
    modules: dict[str, list[str]] = {"": []}
    for name in shapes:
        parts = name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        modules.setdefault(".".join(parts[: index + 1]) if index is not None else "", []).append(
            name
        )
    return modules


def _sizes(shapes: Mapping[str, Shape], width: int, counts: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the wrapped modules: layers, and what stands outside of them ("")."""
    return {
        module: sum(counts.get(name, 1) * prod(shapes[name]) * width for name in names)
        for module, names in _modules(shapes).items()
    }


def _gathered(shapes: Mapping[str, Shape], width: int, counts: Mapping[str, int]) -> int:
    return sum(sorted(_sizes(shapes, width, counts).values())[-2:])


def _scattered(shapes: Mapping[str, Shape], width: int, counts: Mapping[str, int]) -> int:
    """What the backward pass takes at most, without what :func:`_gathered` counts.

    Outer parameters and their gradients; of the largest layer parameters, gradients, what is sent
    of them and the next layer. At the end the outer gradients are sent in their turn.
    """
    sizes = _sizes(shapes, width, counts)
    outer = sizes.pop("")
    layer = max(sizes.values(), default=0)
    most = outer * 2 + max(layer * 4, outer + layer)
    return most - _gathered(shapes, width, counts)


# The matrices of a layer that write to the residual stream, by the last part of their module.
WRITERS = {
    "o_proj", "down_proj", "out_proj", "c_proj", "dense", "fc2", "wo", "w2", "dense_4h_to_h",
}  # fmt: skip


def activations(shapes: Mapping[str, Shape], setup: TrainingSetup) -> int:
    """Bytes that one forward pass keeps, of a decoder with gated FFNs and fused attention.

    A layer keeps for every token, in entries: what each matrix writes; what those that write to the
    residual stream read (attention's output, the FFN's product) and the activation function's
    output; of each norm its input and its output before the gain, and what it gives on. The output
    layer has logits, their softmax and their gradient, in float32. Attention maps (``eager``) are
    not counted, nor are mixtures.
    """
    if not setup.tokens or any("expert" in name for name in shapes):
        return 0
    vocabulary, hidden = max(
        (shape for name, shape in shapes.items() if len(shape) == 2 and "embed" in name),
        default=(0, 0),
    )
    if not hidden:
        return 0
    narrow = 2 if setup.bf16_autocast or setup.dtype in ("bfloat16", "BF16") else 4
    layers = []
    for module, names in _modules(shapes).items():
        if not module:
            continue
        matrices = {name: shapes[name] for name in names if len(shapes[name]) == 2}
        read = [shape[1] for name, shape in matrices.items() if name.split(".")[-2] in WRITERS] or [
            0
        ]
        written = sum(shape[0] for shape in matrices.values())
        layers.append((written + sum(read) + max(read)) * narrow + 4 * hidden * 4)
    again = len(layers) * hidden * 4 + max(layers, default=0)
    kept = again if setup.checkpointing else sum(layers)
    return setup.tokens * (kept + 3 * vocabulary * 4)
