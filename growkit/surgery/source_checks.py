"""What is looked at in the weights of a source: NaN and infinity while its bytes pass through the
cache, and names that stand for another tensor, stored all the same, as in some published
checkpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import Checkpoint, TensorInfo
from growkit.core.errors import CheckpointError
from growkit.families import Family

# safetensors dtype -> (bytes, bits of the smallest pattern above all positive finite numbers).
# The patterns of floats are ordered like numbers with a sign bit, infinity and NaN last.
_FIRST_NON_FINITE = {
    "F64": (8, 0x7FF0000000000000),
    "F32": (4, 0x7F800000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),
}


def all_finite(data: npt.NDArray[Any], dtype: str) -> bool:
    """No NaN or infinity in a contiguous block of a tensor; True for dtypes that have none.

    As signed integers, positive numbers are the largest; as unsigned ones, negative numbers are.

    Args:
        data: the tensor's bytes or elements, any shape.
        dtype: safetensors name of the element type.
    """
    if dtype not in _FIRST_NON_FINITE or not data.size:
        return True
    size, limit = _FIRST_NON_FINITE[dtype]
    raw = data.reshape(-1).view(np.uint8)
    sign = 1 << (8 * size - 1)
    return (
        int(raw.view(f"i{size}").max()) < limit and int(raw.view(f"u{size}").max()) < sign + limit
    )


class FiniteCheck:
    """Looks at each source tensor once, however many written tensors are made of it.

    Args:
        checkpoint: the source.
        report: called with the name of a source tensor that is not finite, once, from any thread.
    """

    def __init__(self, checkpoint: Checkpoint, report: Callable[[str], None]) -> None:
        self._checkpoint, self._report = checkpoint, report
        self._claimed: set[tuple[str, int]] = set()
        self._reported: set[str] = set()
        self._lock = threading.Lock()

    def claim(self, name: str, start: int = 0) -> bool:
        """True for the first caller that asks for this tensor: it has to look at all of it.

        ``start`` tells the matrices of a stack apart (bytes).
        """
        if self._checkpoint.tensors[name].dtype not in _FIRST_NON_FINITE:
            return False
        with self._lock:
            first = (name, start) not in self._claimed
            self._claimed.add((name, start))
        return first

    def look(self, name: str, block: npt.NDArray[Any]) -> None:
        """Check a block that was read from a source tensor."""
        if all_finite(block, self._checkpoint.tensors[name].dtype):
            return
        with self._lock:
            first = name not in self._reported
            self._reported.add(name)
        if first:
            self._report(name)


PIECE_BYTES = 4 << 20


def tied_head_note(
    checkpoint: Checkpoint, family: Family, sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """What a plan says about a stored output projection that the embedding stands for."""
    return tuple(
        f"{copy} is stored although embeddings are tied; growth continues only if it equals "
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
