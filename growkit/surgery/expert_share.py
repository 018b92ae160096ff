"""How the copies of an expert share what they write: the same three choices as for other copies.

Copies whose router rows are equal are chosen together and their outputs averaged. Equal copies
would also get equal gradients and stay equal for ever; so each of r copies carries r times its part
of down_proj, and the mean of the copies is the old matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from growkit.surgery.symmetry import Symmetry, shares

if TYPE_CHECKING:
    from growkit.surgery.tensor_plans import TensorPlan

Array = npt.NDArray[Any]


def part_of(block: Array, tensor: TensorPlan, symmetry: Symmetry, position: int) -> Array:
    """The part of a block of source rows that goes into ``tensor``, before its factor.

    All copies draw the same random numbers, keyed by the source: so the parts sum to the block.

    Args:
        block: rows of the source [rows, columns].
        tensor: one matrix.
        symmetry: how copies share.
        position: number of the block in the source.
    """
    share = tensor.share
    if share is None:
        return block
    key = f"{tensor.source_key}#experts{share.copies}"
    return shares(block, share.copies, symmetry, key, position)[share.rank]
