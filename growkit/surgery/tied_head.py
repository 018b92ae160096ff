"""Names that stand for another tensor, stored all the same, as in some published checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from growkit.checkpoint import Checkpoint, TensorInfo
from growkit.core.errors import CheckpointError
from growkit.families import Family

PIECE_BYTES = 4 << 20


def tied_head_note(
    checkpoint: Checkpoint, family: Family, sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """What a plan says about a stored output projection that the embedding stands for."""
    return tuple(
        f"{copy} is stored although embeddings are tied; growth goes on only if it equals "
        f"{embedding}, and then leaves it out"
        for copy, embedding in family.tied_names(sizes).items()
        if copy in checkpoint.tensors
    )


def check_tied_head(checkpoint: Checkpoint, family: Family, sizes: Mapping[str, int]) -> None:
    """Compare stored copies of a tied tensor (the output projection) with it, piece by piece.

    Raises:
        CheckpointError: they differ, so the checkpoint is not what its config says.
    """
    for copy, original in family.tied_names(sizes).items():
        if copy in checkpoint.tensors:
            _compare(checkpoint, checkpoint.tensors[copy], checkpoint.tensors[original])


def _compare(checkpoint: Checkpoint, head: TensorInfo, embedding: TensorInfo) -> None:
    same = head.dtype == embedding.dtype and head.nbytes == embedding.nbytes
    left, right = np.empty((2, min(PIECE_BYTES, embedding.nbytes)), np.uint8)
    for offset in range(0, embedding.nbytes if same else 0, PIECE_BYTES):
        count = min(PIECE_BYTES, embedding.nbytes - offset)
        checkpoint.read_into(head.name, left[:count], offset)
        checkpoint.read_into(embedding.name, right[:count], offset)
        if not np.array_equal(left[:count], right[:count]):
            same = False
            break
    if not same:
        raise CheckpointError(
            f"config.json says that embeddings are tied, but {head.name} is stored and differs "
            f"from {embedding.name}.",
            "transformers would use both as they are: set tie_word_embeddings to false in "
            "config.json if that is meant, or remove the stale tensor.",
        )
