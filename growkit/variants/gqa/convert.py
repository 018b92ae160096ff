"""MHA, GQA and MQA into each other: the same model with more or fewer key/value heads.

More heads: every head repeated in place (``repeat_interleave``), bit-exact. Fewer: the heads of a
group become one, which is another function (GQA, arXiv 2305.13245, section 2.2: the mean is better
than the first head, and that better than a random one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from growkit.checkpoint import Checkpoint
from growkit.core.errors import UsageError
from growkit.families import Family
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Array, Computed, Effect, Exactness, ModelShape, Operator
from growkit.variants.request import ConversionRequest

MERGED = {"mean": "mean", "first": "first", "aligned": "mean of the aligned heads"}
ROLES = ("k", "v", "k_bias", "v_bias")


@dataclass(frozen=True)
class ToKvHeads:
    """To ``heads`` key/value heads; None: as many as query heads.

    Attributes:
        merge: how several heads become one (``MERGES`` of ``variants/request.py``); ``aligned``
            is the mean of what :class:`growkit.variants.gqa.aligned.Aligned` has turned.
    """

    heads: int | None
    merge: str = "mean"

    def apply(self, shape: ModelShape) -> Effect:
        query, before = _counts(shape)
        after = query if self.heads is None else self.heads
        if after < 1 or query % after or (after % before and before % after):
            fitting = [n for n in range(1, query + 1) if query % n == 0]
            fitting = [n for n in fitting if n % before == 0 or before % n == 0]
            raise UsageError(
                f"--kv-heads {after}: {query} query heads on {before} key/value heads cannot have "
                "so many.",
                f"Numbers that fit: {', '.join(map(str, fitting))}.",
            )
        config = dict(shape.config)
        sizes = {**shape.sizes, "kv_head": after}
        stated = shape.family.config_fields(sizes)
        config["num_key_value_heads"] = stated["num_key_value_heads"]
        if after >= before and self.merge == "aligned":
            raise UsageError(
                f"--merge aligned: {before} key/value heads -> {after} merges none.",
                f"Give fewer than {before} with --kv-heads, or leave --merge out.",
            )
        if after >= before:
            return Effect(
                config=config,
                summary=f"key/value heads {before} -> {after} (repeated)",
                exactness=Exactness.BIT_EXACT,
                reason="every query head reads a copy of its own key/value head",
                axes={"kv_head": AxisMap.spread(before, after)},
            )
        return Effect(
            config=config,
            summary=f"key/value heads {before} -> {after} ({MERGED[self.merge]} of each group)",
            exactness=Exactness.NOT_EXACT,
            reason="the heads of a group are merged into one (arXiv 2305.13245)",
            computed={
                role: merged(shape.family, role, before // after, shape.sizes["head_dim"], self)
                for role in ROLES
                if shape.has(role)
            },
            warnings=(
                "merged heads need uptraining: about 5 % of the pretraining tokens in "
                "arXiv 2305.13245",
            ),
        )


def _counts(shape: ModelShape) -> tuple[int, int]:
    sizes = shape.sizes
    roles = [shape.family.tensor(role) for role in ("q", "k", "v")]
    if (
        not {"query_head", "kv_head"} <= sizes.keys()
        or None in roles
        or len(shape.family.stacks) > 1
    ):
        raise UsageError(
            f"The key/value heads of a {shape.family.name} checkpoint cannot be converted.",
            "This works on decoders with q_proj, k_proj and v_proj and ordinary attention.",
        )
    if any("kv_head" not in t.dims[0].layout(sizes).axes for t in roles[1:] if t is not None):
        raise UsageError(
            f"A {shape.family.name} checkpoint trains other key/value heads than those it attends "
            "with.",
            "Fold it first: growkit convert CKPT --to plain.",
        )
    return sizes["query_head"], sizes["kv_head"]


def merged(family: Family, role: str, group: int, dim: int, conversion: ToKvHeads) -> Computed:
    """Rows of a projection (or entries of a bias) whose heads are merged ``group`` to one."""
    tensor = family.tensor(role)
    assert tensor is not None
    name = tensor.name

    def rows(checkpoint: Checkpoint, layer: int, first: int, count: int) -> Array:
        # Whole heads are read, so that blocks may begin anywhere.
        whole = checkpoint.read(name.replace("{layer}", str(layer)))
        heads = whole.reshape(-1, group, dim, whole.size // len(whole))
        wanted = np.arange(first, first + count)
        head, channel = wanted // dim, wanted % dim
        if conversion.merge == "first":
            return heads[head, 0, channel].astype(np.float64)
        total = np.zeros((count, heads.shape[-1]))
        for member in range(group):
            total += heads[head, member, channel]
        return total / group

    return Computed(rows, (role,))


TARGETS: Mapping[str, Callable[[ConversionRequest], Operator]] = {
    "mha": lambda request: ToKvHeads(None),
    "gqa": lambda request: ToKvHeads(request.needed("kv_heads"), request.merge),
    "mqa": lambda request: ToKvHeads(1, request.merge),
}
