"""Untie the embeddings: the output projection becomes a tensor of its own, equal at the start."""

from __future__ import annotations

from dataclasses import dataclass

from growkit.core.errors import UsageError
from growkit.surgery.effect import Effect, Exactness, ModelShape
from growkit.surgery.operators import OperatorRow
from growkit.surgery.request import GrowthRequest


@dataclass(frozen=True)
class UntieEmbeddings:
    """Write ``lm_head.weight`` as a copy of the embedding (Motif 2.6B -> Motif-2-12.7B)."""

    def apply(self, shape: ModelShape) -> Effect:
        if not shape.sizes["tied"]:
            raise UsageError(
                "--untie-embeddings: the embeddings of this checkpoint are not tied.",
                "Leave the option out.",
            )
        if shape.family.ties_by_values:
            raise UsageError(
                f"--untie-embeddings: transformers ties {shape.family.name} embeddings again as "
                "long as both tensors hold the same values.",
                "Leave the option out.",
            )
        return Effect(
            operator="untie_embeddings",
            summary="embeddings untied: lm_head starts as a copy of the embedding",
            sizes={"tied": 0},
            exactness=Exactness.BIT_EXACT,
            reason="the output projection keeps its values",
        )


def make(row: OperatorRow, value: bool, request: GrowthRequest) -> UntieEmbeddings:
    return UntieEmbeddings()


def grows(row: OperatorRow, shape: ModelShape) -> bool:
    return bool(shape.sizes["tied"])
