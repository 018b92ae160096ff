"""Rows of new tokens in an embedding or an output matrix, made of the old rows.

* ``subwords``: the mean of the rows of the old tokens that spell the new one; a token that they
  cannot spell takes the mean of all.
* ``mean``: the mean of all old rows (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
  Language Models": with it in the output matrix a new token is as likely as an average one, and the
  others keep almost all of their probability).
* ``noise-mean``: the mean of all and normal noise of their covariance (of a sample of rows).
* ``zero``.

A head's bias starts likewise, and ``--new-token-bias`` adds a number to it
(:func:`growkit.vocabulary.embedding_rows.bias_for_share`).
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import DTYPES, Checkpoint
from growkit.families.unit_layout import IntArray
from growkit.surgery.effect import NewTokens
from growkit.surgery.symmetry import random_bits

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
STEP = 1 << 20  # elements that are read at once
SAMPLE = 4096  # rows that the noise's covariance is that of


class TokenRows:
    """The new rows of one stored table.

    Args:
        checkpoint: the source.
        name: of the table, [vocab, width] or [vocab].
        tokens: how they start.
        seed: of the noise.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, tokens: NewTokens, seed: int) -> None:
        self.checkpoint, self.name, self.tokens, self.seed = checkpoint, name, tokens, seed
        info = checkpoint.tensors[name]
        kind = DTYPES[info.dtype].numpy
        assert kind is not None
        self.dtype, self.width = kind, int(np.prod(info.shape[1:]))
        self.bias = tokens.bias if len(info.shape) == 1 else {}
        self._lock = threading.Lock()

    def of(self, rows: IntArray) -> Floats:
        """The rows of new tokens, before any other axis grows; float64 [rows, width]."""
        if self.tokens.method == "zero":
            return np.zeros((len(rows), self.width))
        with self._lock:
            mean = self._mean
        result = np.tile(mean, (len(rows), 1))
        if self.tokens.method == "subwords":
            for place, token in enumerate(rows.tolist()):
                if parts := self.tokens.parts.get(token):
                    result[place] = np.mean([self._row(part) for part in parts], axis=0)
        elif self.tokens.method == "noise-mean":
            with self._lock:
                sample = self._sample
            for place, token in enumerate(rows.tolist()):
                key = random_bits(self.seed, f"{self.name}#new token", token, 8)
                drawn = np.random.Generator(np.random.Philox(int.from_bytes(key, "little")))
                weights = drawn.standard_normal(len(sample)) / np.sqrt(max(1, len(sample)))
                result[place] += weights @ sample
        if self.bias:
            result += np.array([[self.bias.get(token, 0.0)] for token in rows.tolist()])
        return result

    def _read(self, first: int, count: int) -> Floats:
        block = np.empty((count, self.width), self.dtype)
        self.checkpoint.read_into(self.name, block, first * self.width * self.dtype.itemsize)
        return block.astype(np.float64)

    def _row(self, index: int) -> Floats:
        row: Floats = self._read(index, 1)[0]
        return row

    @cached_property
    def _mean(self) -> Floats:
        """Of the rows of all old tokens (not of padding, where a tokenizer says which is)."""
        size, step = self.tokens.old_tokens, max(1, STEP // self.width)
        total = np.zeros(self.width)
        for first in range(0, size, step):
            total += self._read(first, min(step, size - first)).sum(axis=0)
        mean: Floats = total / size
        return mean

    @cached_property
    def _sample(self) -> Floats:
        """Random old rows less the mean; [sample, width]."""
        key = random_bits(self.seed, f"{self.name}#sample", 0, 8)
        drawn = np.random.Generator(np.random.Philox(int.from_bytes(key, "little")))
        count = min(SAMPLE, self.tokens.old_tokens)
        chosen = np.sort(drawn.choice(self.tokens.old_tokens, count, replace=False))
        return np.array([self._row(int(index)) for index in chosen]) - self._mean
