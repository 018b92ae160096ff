"""Fewer key/value heads, each group aligned before it is merged by the mean (arXiv 2412.20677)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from growkit.checkpoint import Checkpoint
from growkit.core.errors import CheckpointError, UsageError
from growkit.surgery.effect import Array, Computed, Effect, ModelShape, Operator
from growkit.variants.gqa.alignment import Alignment

# Rotary embeddings on all channels, pairs (i, i + head_dim / 2), in every layer.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Rows of o_proj that are multiplied at once; always the same ones, so that blocks do not matter.
ROWS = 64


@dataclass(frozen=True)
class Aligned:
    """A merge of key/value heads that are turned towards each other first.

    The turn alone is exact: queries turn with their keys, output columns turn back the values.

    Attributes:
        merge: the mean of each group.
        alignment: the turns, calibrated on the source.
    """

    merge: Operator
    alignment: Alignment

    def apply(self, shape: ModelShape) -> Effect:
        converted = self.merge.apply(shape)
        check_alignable(shape)
        sizes, alignment = shape.sizes, self.alignment
        expected = (sizes["layer"], sizes["kv_head"], sizes["head_dim"])
        if alignment.values.shape != (*expected, expected[-1]) or alignment.angles.shape != (
            *expected[:-1],
            expected[-1] // 2,
        ):
            raise CheckpointError(
                f"The alignment has turns {alignment.values.shape}, the model needs "
                f"{(*expected, expected[-1])}.",
                "It was calibrated on another model: convert again.",
            )
        group = sizes["kv_head"] // converted.config["num_key_value_heads"]
        rotated, pairs = alignment.rotated_pairs
        kept = "" if rotated else "; no pair of keys could be rotated"
        if 0 < rotated < pairs:
            kept = f"; keys rotated in {rotated} of {pairs} pairs"
        text = f"; calibrated on {alignment.tokens} tokens"
        summary = converted.summary.removesuffix(")")
        return replace(
            converted,
            summary=f"{summary}{kept}{text})",
            reason="heads of a group are turned towards each other, then merged (arXiv 2412.20677)",
            computed=turned(shape, alignment, group),
        )


def check_alignable(shape: ModelShape) -> None:
    """Raises:
    UsageError: rotations of key pairs would not commute with the model's position embeddings.
    """
    rope = shape.config.get("rope_parameters") or {}
    partial = shape.config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if shape.family.name not in FAMILIES or partial not in (None, 1.0):
        raise UsageError(
            f"--merge aligned: the heads of this {shape.family.name} checkpoint cannot be aligned.",
            f"It works on {', '.join(FAMILIES)} with full rotary embeddings; use --merge mean.",
        )


def rotatable_pairs(checkpoint: Checkpoint, shape: ModelShape, layer: int) -> Array:
    """[head_dim / 2], True where a rotation of the pair can be folded into q and k.

    A norm in every head keeps its length under rotation, but its gain stands behind it: only a
    pair of equal gains, in both norms, commutes.
    """
    free = np.ones(shape.sizes["head_dim"] // 2, dtype=bool)
    for role in ("q_norm", "k_norm"):
        tensor = shape.family.tensor(role)
        if tensor is not None and tensor.when(shape.sizes):
            gain = checkpoint.read(tensor.name.replace("{layer}", str(layer)))
            first, second = gain.astype(np.float64).reshape(2, -1)
            free &= first == second
    return free


def turned(shape: ModelShape, alignment: Alignment, group: int) -> dict[str, Computed]:
    """Role -> how its entries are calculated; ``group`` heads become one (1: turned only)."""
    sizes = shape.sizes
    shared = sizes["query_head"] // sizes["kv_head"]

    def keys(layer: int) -> Array:
        return alignment.keys(layer)

    def queries(layer: int) -> Array:
        return alignment.keys(layer).repeat(shared, axis=0)

    def values(layer: int) -> Array:
        return alignment.values[layer]

    plans = {"q": (queries, 1), "k": (keys, group), "v": (values, group)}
    computed = {}
    for role, (turns, merged) in plans.items():
        for part in (role, f"{role}_bias"):
            tensor = shape.family.tensor(part)
            if tensor is not None and tensor.when(sizes):
                computed[part] = Computed(_rows(tensor.name, turns, merged), (part,))
    output = shape.family.tensor("o")
    assert output is not None
    computed["o"] = Computed(
        _columns(output.name, lambda layer: values(layer).repeat(shared, axis=0)), ("o",)
    )
    return computed


def _rows(
    name: str, turns: Callable[[int], Array], group: int
) -> Callable[[Checkpoint, int, int, int], Array]:
    """Rows of a projection (entries of a bias): heads turned, then the mean of each group."""

    def rows(checkpoint: Checkpoint, layer: int, first: int, count: int) -> Array:
        matrices = turns(layer)
        heads, dim, _ = matrices.shape
        whole = checkpoint.read(name.replace("{layer}", str(layer))).reshape(heads, dim, -1)
        start, end = first // dim, -(-(first + count) // dim)
        blocks = np.zeros((end - start, dim, whole.shape[-1]))
        for head in range(start, end):
            for member in range(head * group, (head + 1) * group):
                blocks[head - start] += matrices[member] @ whole[member].astype(np.float64)
        flat = blocks.reshape(-1, whole.shape[-1]) / group
        return flat[first - start * dim :][:count]

    return rows


def _columns(
    name: str, turns: Callable[[int], Array]
) -> Callable[[Checkpoint, int, int, int], Array]:
    """Rows of o_proj whose columns undo the turn of the values."""

    def rows(checkpoint: Checkpoint, layer: int, first: int, count: int) -> Array:
        matrices = turns(layer)
        heads, dim, _ = matrices.shape
        whole = checkpoint.read(name.replace("{layer}", str(layer)))
        start, end = first // ROWS * ROWS, first + count
        parts = []
        for row in range(start, end, ROWS):
            part = whole[row : row + ROWS].astype(np.float64).reshape(-1, heads, dim)
            # sum_c W[c] O[j, c]: y = W v = (W O^T)(O v).
            back = [part[:, head] @ matrices[head].T for head in range(heads)]
            parts.append(np.concatenate(back, axis=1))
        return np.concatenate(parts)[first - start :][:count]

    return rows
