"""Tied checkpoints that store the output projection all the same, as some published ones do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from growkit.checkpoint import Checkpoint
from growkit.errors import CheckpointError
from growkit.families import Family

PIECE_BYTES = 4 << 20


def tied_head_note(
    checkpoint: Checkpoint, family: Family, sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """What a plan says about a stored output projection that the embedding stands for."""
    names = family.tied_names(sizes)
    if names is None or names[0] not in checkpoint.tensors:
        return ()
    head, embedding = names
    return (
        f"{head} is stored although embeddings are tied; growth goes on only if it equals "
        f"{embedding}, and then leaves it out",
    )


def check_tied_head(checkpoint: Checkpoint, family: Family, sizes: Mapping[str, int]) -> None:
    """Compare a stored output projection with the embedding that it is tied to, piece by piece.

    Raises:
        CheckpointError: they differ, so the checkpoint is not what its config says.
    """
    names = family.tied_names(sizes)
    if names is None or names[0] not in checkpoint.tensors:
        return
    head, embedding = (checkpoint.tensors[name] for name in names)
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
