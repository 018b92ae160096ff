"""Heads of a group turned towards each other, before they are merged into one.

What a head computes does not change when its values are turned by an orthogonal matrix and its
output projection back, nor when queries and keys are turned alike. Behind rotary embeddings the
latter holds only for rotations of the pairs (i, i + head_dim / 2), which commute with them
(arXiv 2412.20677).
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.core.errors import CheckpointError

# Not safetensors: engines that load every *.safetensors of a folder would take it for weights.
FILE = "growkit_alignment.npz"
ROUNDS = 5
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Alignment:
    """How every key/value head of a model is turned.

    Attributes:
        angles: of its key pairs (i, i + head_dim / 2), in radians, float64
            [layers, kv heads, head_dim / 2].
        values: orthogonal matrices that turn its values (columns), float64
            [layers, kv heads, head_dim, head_dim].
        tokens: of the text that it was calibrated on.
    """

    angles: Array
    values: Array
    tokens: int

    def keys(self, layer: int) -> Array:
        """Orthogonal matrices [kv heads, head_dim, head_dim] that turn keys and queries."""
        cos, sin = np.cos(self.angles[layer]), np.sin(self.angles[layer])
        heads, half = cos.shape
        first, second = np.arange(half), np.arange(half, 2 * half)
        turn = np.zeros((heads, 2 * half, 2 * half))
        turn[:, first, first] = turn[:, second, second] = cos
        turn[:, first, second], turn[:, second, first] = -sin, sin
        return turn

    @property
    def rotated_pairs(self) -> tuple[int, int]:
        """(pairs of channels that some head of a layer rotates, all pairs of all layers)."""
        turned = (self.angles != 0).any(axis=1)
        return int(turned.sum()), turned.size

    def to_bytes(self) -> bytes:
        """Content of ``FILE``; the same for the same alignment."""
        buffer = io.BytesIO()
        np.savez(buffer, angles=self.angles, values=self.values, tokens=self.tokens)
        return buffer.getvalue()


def read_alignment(folder: Path) -> Alignment:
    """The alignment that a converted folder was made with.

    Raises:
        CheckpointError: ``FILE`` is missing or damaged.
    """
    try:
        with np.load(folder / FILE, allow_pickle=False) as stored:
            found = Alignment(stored["angles"], stored["values"], int(stored["tokens"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{FILE} in {str(folder)!r} cannot be read: {error}.",
            "Copy it from where the folder was converted, or convert again.",
        ) from error
    return found


def aligned_angles(moments: Array) -> Array:
    """Angles [heads, pairs] by which the keys of a group's heads come closest to each other.

    Coordinate ascent on the sum of all inner products of two heads: every step is the optimum of
    one head with the others fixed. The first head begins unturned.

    Args:
        moments: complex [pairs, heads, heads], sum over tokens of conj(z_a) z_b of the pair
            z = k_i + 1j k_(i + head_dim / 2).
    """
    pairs, heads, _ = moments.shape
    turns = np.ones((heads, pairs), dtype=np.complex128)
    for head, others in _rounds(heads):
        # conj(sum_o turn_o z_o) turn_h z_h is real and positive at the optimum.
        inner = sum(np.conj(turns[o]) * moments[:, o, head] for o in others)
        turns[head] = np.exp(-1j * np.angle(inner))
    return np.angle(turns)


def aligned_bases(moments: Array) -> Array:
    """Orthogonal matrices [heads, d, d] by which the values of a group's heads come closest.

    Orthogonal Procrustes of each head towards the sum of the others, several rounds.

    Args:
        moments: [heads, d, heads, d], sum over tokens of v_a v_b^T.
    """
    heads, dim = moments.shape[:2]
    turns = np.stack([np.eye(dim)] * heads)
    for head, others in _rounds(heads):
        cross = sum(turns[o] @ moments[o, :, head, :] for o in others)
        left, _, right = np.linalg.svd(cross)
        turns[head] = left @ right
    return turns


def _rounds(heads: int) -> list[tuple[int, list[int]]]:
    """(head, heads it is turned towards): at first those before it, then all others."""
    first = [(head, list(range(head))) for head in range(1, heads)]
    every = [(h, [o for o in range(heads) if o != h]) for h in range(heads)]
    return first + every * (ROUNDS if heads > 1 else 0)
