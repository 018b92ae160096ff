"""DIFF V1 -> Shared DIFF: two projections become one base and low-rank updates.

The difference D = W_1 - W_2 of the two maps of a head (or of a key pair) has the singular value
decomposition sum_i s_i u_i v_i^T. Map 1 takes the first r terms as its update, map 2 minus the next
r, and the base what is left between them::

    U_1 = D_1..r     U_2 = -D_r+1..2r     base = W_1 - U_1 - R / 2     R = D_2r+1..d

so that base + U_1 = W_1 - R / 2 and base + U_2 = W_2 + R / 2: of all bases and updates of rank r
this loses least (Eckart-Young: W_1 - W_2 of rank 2 r is all that the form can hold), and nothing
from 2 r = head_dim on. Each factor carries the root of the singular values. Source of the form:
arXiv 2501.17900 (abstract); our reading stands in growkit/variants/shared_diff/attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from growkit.checkpoint import Checkpoint
from growkit.core.errors import UsageError
from growkit.surgery.effect import Alias, Array, Computed, Effect, Exactness, ModelShape
from growkit.variants.diffllama.convert import ToDifferential

ADJACENT = ("diff_v1", "gda", "motif")  # the two maps of a head stand beside each other


@dataclass(frozen=True)
class ToLowRank:
    """Updates of ``rank`` for the queries and of ``key_rank`` for the keys (None: the same)."""

    rank: int
    key_rank: int | None = None

    def apply(self, shape: ModelShape) -> Effect:
        key_rank = self.rank if self.key_rank is None else self.key_rank
        dim, ranks = shape.sizes["head_dim"], {"q": self.rank, "k": key_rank}
        if shape.family.name not in ADJACENT:
            raise UsageError(
                f"A {shape.family.name} checkpoint cannot become shared_diff in one step.",
                "Convert it first, exactly: --to diff_v1.",
            )
        if key_rank == 0:
            raise UsageError(
                "--key-rank 0: the two maps have keys of their own, which one base cannot hold.",
                f"Give a number from 1 to {dim}, or leave --key-rank out.",
            )
        if not all(1 <= rank <= dim for rank in ranks.values()):
            raise UsageError(
                f"Updates of rank {ranks['q']} and {ranks['k']}: a head has {dim} channels.",
                f"Give --rank and --key-rank from 1 to {dim}.",
            )
        if shape.sizes["attention_bias"]:
            raise UsageError(
                "The two maps have biases of their own, and Shared DIFF has one for both.",
                "Only checkpoints without biases on q and k become shared_diff.",
            )
        as_v1 = ToDifferential("diff_v1")
        config = as_v1.apply(shape).config if shape.family.name != "diff_v1" else shape.config
        lossless = 2 * min(ranks.values()) >= dim
        computed: dict[str, Computed] = {}
        for kind, rank in ranks.items():
            computed |= _parts(shape, kind, rank)
        return Effect(
            config={**config, "attention": "shared_diff"}
            | {"query_rank": ranks["q"], "key_rank": ranks["k"]},
            summary=f"two maps a head -> one base and updates of rank {ranks['q']} (queries) and "
            f"{ranks['k']} (keys), by singular values",
            exactness=Exactness.ROUNDED if lossless else Exactness.NOT_EXACT,
            reason="the maps differ by no more than twice the rank"
            if lossless
            else "singular values behind twice the rank are dropped",
            aliases={"query_head": Alias("signal_head")},
            computed=computed,
            measure=lambda checkpoint: (_error_text(checkpoint, shape),),
        )


def _parts(shape: ModelShape, kind: str, rank: int) -> dict[str, Computed]:
    """Base, ``down`` [2 heads r, hidden] and ``up`` [2 heads d, r] of queries or keys."""

    @lru_cache(maxsize=2)  # the three tensors of a layer follow one another
    def factors(checkpoint: Checkpoint, layer: int) -> Mapping[str, Array]:
        pairs = _pairs(checkpoint, shape, kind, layer)
        u, s, v = np.linalg.svd(pairs[:, 0] - pairs[:, 1], full_matrices=False)
        count, dim, width = u.shape[0], u.shape[1], v.shape[2]
        down = np.zeros((count, 2, rank, width))
        up = np.zeros((count, 2, dim, rank))
        for which, sign in ((0, 1.0), (1, -1.0)):
            part = slice(which * rank, min((which + 1) * rank, s.shape[1]))
            kept = max(part.stop - part.start, 0)
            root = np.sqrt(s[:, part])
            down[:, which, :kept] = root[:, :, None] * v[:, part]
            up[:, which, :, :kept] = sign * u[:, :, part] * root[:, None, :]
        updates = up @ down  # [heads, 2, d, hidden]
        base = ((pairs - updates).sum(axis=1)) / 2
        return {
            kind: base.reshape(-1, width),
            f"{kind}_down": down.reshape(-1, width),
            f"{kind}_up": up.reshape(-1, rank),
        }

    def rows_of(role: str) -> Callable[[Checkpoint, int, int, int], Array]:
        def rows(checkpoint: Checkpoint, layer: int, first: int, count: int) -> Array:
            return factors(checkpoint, layer)[role][first : first + count]

        return rows

    return {role: Computed(rows_of(role), (kind,)) for role in (kind, f"{kind}_down", f"{kind}_up")}


def _pairs(checkpoint: Checkpoint, shape: ModelShape, kind: str, layer: int) -> Array:
    """Projection rows in float64: [heads, map, head_dim, hidden]."""
    tensor = shape.family.tensor(kind)
    assert tensor is not None
    weight = checkpoint.read(tensor.name.replace("{layer}", str(layer))).astype(np.float64)
    return weight.reshape(-1, 2, shape.sizes["head_dim"], weight.shape[1])


def relative_error(
    checkpoint: Checkpoint, shape: ModelShape, kind: str
) -> tuple[list[int], list[float]]:
    """(ranks, Frobenius norm of what both maps lose over the norm of both), all layers together."""
    dim = shape.sizes["head_dim"]
    whole, squares = 0.0, np.zeros(dim)
    for layer in range(shape.sizes["layer"]):
        pairs = _pairs(checkpoint, shape, kind, layer)
        values = np.linalg.svd(pairs[:, 0] - pairs[:, 1], compute_uv=False)
        whole += float((pairs**2).sum())
        squares[: values.shape[1]] += (values**2).sum(axis=0)
    ranks = [rank for rank in (2**i for i in range(dim.bit_length())) if 2 * rank <= dim]
    # Either map is off by R / 2.
    lost = [float(np.sqrt(squares[2 * rank :].sum() / 2 / whole)) for rank in ranks]
    return ranks, lost


def _error_text(checkpoint: Checkpoint, shape: ModelShape) -> str:
    texts = []
    for kind, word in (("q", "queries"), ("k", "keys")):
        table = zip(*relative_error(checkpoint, shape, kind), strict=True)
        texts.append(f"{word} " + ", ".join(f"{rank}: {error:.3g}" for rank, error in table))
    return "relative error of the projections by rank: " + "; ".join(texts)
