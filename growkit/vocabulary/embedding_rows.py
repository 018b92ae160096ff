"""Where every row of a new embedding comes from: the token's old row, a mean of old rows, or none.

Tokens keep their rows by what they are, wherever their id moved. A token that is new begins as the
mean of the rows of the old tokens that spell it (``subwords``): what the old model read for the
same text, and the usual initialisation of continual pretraining in a new language or domain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from growkit.core.errors import UsageError
from growkit.families.unit_layout import IntArray
from growkit.vocabulary.tokens import Tokens

NEW = -1
METHODS = ("subwords", "mean", "noise-mean", "zero")


@dataclass(frozen=True, eq=False)
class VocabularyRows:
    """The rows of a grown vocabulary.

    Attributes:
        source: old row of each new row, or ``NEW``; shape [new rows].
        old_size: rows of the old embedding.
        parts: new row -> the old rows whose mean it is; new rows that are missing here have no
            spelling and take the mean of all.
        tokens: tokens of the new tokenizer; rows above belong to none.
        old_tokens: of the old one.
        dropped: old tokens that the new tokenizer does not have.
    """

    source: IntArray
    old_size: int
    parts: Mapping[int, tuple[int, ...]]
    tokens: int
    old_tokens: int
    dropped: tuple[str, ...] = ()

    @property
    def new_size(self) -> int:
        return len(self.source)

    @property
    def new(self) -> int:
        """Rows without an old one."""
        return int((self.source == NEW).sum())

    @property
    def moved(self) -> int:
        """Rows whose token has another id than before."""
        index = np.arange(len(self.source))
        return int(((self.source != NEW) & (self.source != index)).sum())

    @cached_property
    def place(self) -> IntArray:
        """New row of each old row, or ``NEW`` where it is dropped; shape [old rows]. Of several
        (padding) the first."""
        place = np.full(self.old_size, NEW, dtype=np.int64)
        known = np.flatnonzero(self.source != NEW)[::-1]
        place[self.source[known]] = known
        return place


def bias_for_share(rows: VocabularyRows, share: float) -> dict[int, float]:
    """What to add to the bias of new tokens so that all of them together get at most ``share``.

    A new token's logit is the mean of those of its parts P (their rows and biases are averaged), so
    exp(logit) is at most the mean of exp over P. With U(o) = sum of 1 / |P| over the new tokens
    that old token o is part of, the bias log(r / max of U over P) keeps the sum over new tokens to
    r times that over old ones, whatever the hidden state: the share is at most r / (1 + r). A bias
    that would raise a token is left out. It holds for means (``subwords`` and ``mean``) of tokens
    that are not dropped, and a head that is linear.

    Args:
        share: above 0 and below 1.

    Returns:
        new row -> bias in nats, 0 or below.
    """
    new = np.flatnonzero(rows.source == NEW).tolist()
    used = np.zeros(rows.old_size)
    for parts in rows.parts.values():
        np.add.at(used, list(parts), 1.0 / len(parts))
    used[: rows.old_tokens] += (len(new) - len(rows.parts)) / rows.old_tokens
    odds, most = np.log(share) - np.log1p(-share), float(used[: rows.old_tokens].max())
    result = {}
    for token in new:
        spelt = list(rows.parts.get(token, ()))
        busiest = float(used[spelt].max()) if spelt else most
        result[token] = min(0.0, float(odds - np.log(busiest)))
    return result


def padded(size: int, multiple: int | None) -> int:
    """``size`` rounded up to a whole multiple."""
    return size if not multiple else -(-size // multiple) * multiple


def rows_of_size(old_size: int, new_size: int) -> VocabularyRows:
    """More rows behind the old ones, for no token yet."""
    if new_size < old_size:
        raise UsageError(
            f"A vocabulary of {new_size:,} rows is smaller than the {old_size:,} of the model.",
            "Vocabulary growth keeps every row: ask for more.",
        )
    source = np.full(new_size, NEW, dtype=np.int64)
    source[:old_size] = np.arange(old_size)
    return VocabularyRows(source, old_size, {}, old_size, old_size)


def rows_of_tokenizer(
    old: Tokens, new: Tokens, old_size: int, new_size: int, *, subwords: bool = True
) -> VocabularyRows:
    """Match the tokens of two tokenizers.

    Rows that belong to no token of the new tokenizer keep the old row of the same index where
    that belonged to no token either (padding), else they repeat an old padding row if there is
    one: training has pushed its logit down.

    Args:
        old, new: the tokenizers.
        old_size: rows of the old embedding; tokens beyond them count as new.
        new_size: rows of the new one.
        subwords: split new tokens by the old tokenizer.

    Raises:
        UsageError: the new tokenizer has more tokens than rows; the two share no token.
    """
    if new.size > new_size:
        raise UsageError(
            f"The new tokenizer has {new.size:,} tokens and its embedding {new_size:,} rows.",
            "Ask for at least as many rows as tokens (--vocab), or leave the number out.",
        )
    source = np.full(new_size, NEW, dtype=np.int64)
    parts: dict[int, tuple[int, ...]] = {}
    for token, index in new.ids.items():
        known = old.id_of(token, new)
        if known is not None and known < old_size:
            source[index] = known
        elif subwords:
            pieces = tuple(piece for piece in old.split(token, new) if piece < old_size)
            parts |= {index: pieces} if pieces else {}
    if not (source != NEW).any():
        raise UsageError(
            f"The tokenizers of {str(old.folder)!r} and {str(new.folder)!r} share no token.",
            "Extend the model's own tokenizer: growkit tokenizer extend.",
        )
    _pad(source, old, new, old_size)
    kept = set(source.tolist())
    dropped = tuple(t for t, index in old.ids.items() if index < old_size and index not in kept)
    return VocabularyRows(source, old_size, parts, new.size, min(old.size, old_size), dropped)


def _pad(source: IntArray, old: Tokens, new: Tokens, old_size: int) -> None:
    """Rows of no token."""
    taken, held = set(new.ids.values()), set(old.ids.values())
    free = [index for index in range(old_size) if index not in held]
    for index in range(len(source)):
        if index in taken:
            continue
        if index < old_size and index not in held:
            source[index] = index
        elif free:
            source[index] = free[0]
