"""Vocabulary: the tokens of another tokenizer, added tokens, or more rows.

A token keeps its row of the embedding and of the output matrix wherever its id moved; a new one
begins as ``vocab_init`` says (:mod:`growkit.surgery.token_rows`). On text of old tokens the hidden
states and the logits of old tokens are the same numbers; the softmax gives new tokens a part of the
probability, which verification measures (docs/algebra.md, "Vocabulary").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.core.errors import UsageError
from growkit.core.json_files import read_json_object
from growkit.families.base import Tensor
from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Effect, Exactness, Fill, ModelShape, NewTokens, NewUnits
from growkit.surgery.operators import OperatorRow
from growkit.vocabulary.embedding_rows import (
    VocabularyRows,
    bias_for_share,
    padded,
    rows_of_size,
    rows_of_tokenizer,
)
from growkit.vocabulary.token_ids import moved_ids, special_ids
from growkit.vocabulary.tokenizer_files import (
    TEMPLATES,
    read_added,
    tokenizer_contents,
    with_added,
)
from growkit.vocabulary.tokens import Tokens, read_tokens

if TYPE_CHECKING:
    from growkit.surgery.request import GrowthRequest

GENERATION = "generation_config.json"
# Means of old rows: no new logit is above those of its parts.
BOUNDED = ("subwords", "mean")


@dataclass(frozen=True)
class Rows:
    """More rows, for no token yet; ``amount`` may be None where only ``multiple`` is asked for."""

    amount: Amount | None
    method: str
    multiple: int | None
    share: float | None = None
    axis: str = "vocab"

    def apply(self, shape: ModelShape) -> Effect:
        size = shape.sizes["vocab"]
        target = size
        if self.amount is not None:
            target = self.amount.resolve(size, "--vocab", "rows of the vocabulary")
        rows = rows_of_size(size, padded(target, self.multiple))
        # There is no token that old ones could spell.
        method = "mean" if self.method == "subwords" else self.method
        return _growth("vocab", rows, method, _bias(shape, rows, method, self.share))


@dataclass(frozen=True)
class Tokenizer:
    """The vocabulary of another tokenizer, or of the model's own with further tokens.

    Attributes:
        folder: of the new tokenizer; None: the model's own.
        added: a file with tokens to add to it.
        method: how new rows start.
        rows: the number of rows, if it is not that of the tokens or of the old rows.
        multiple: the number of rows is rounded up to a whole multiple of it.
        share: of the probability that new tokens get at most, by the head's bias.
    """

    folder: Path | None
    added: Path | None
    rows: Amount | None
    method: str
    multiple: int | None
    share: float | None = None
    axis: str = "vocab"

    def apply(self, shape: ModelShape) -> Effect:
        if shape.folder is None:
            raise UsageError("A config alone has no tokenizer.", "Give a checkpoint folder.")
        old = read_tokens(shape.folder)
        new, files = old, tokenizer_contents(shape.folder)
        if self.folder is not None:
            new, files = read_tokens(self.folder), tokenizer_contents(self.folder)
            if not any(name in files for name in TEMPLATES):
                own = tokenizer_contents(shape.folder)
                files |= {name: own[name] for name in TEMPLATES if name in own}
        if self.added is not None:
            tokens = read_added(self.added)
            new, files = with_added(new, files, tokens)
        size = shape.sizes["vocab"]
        target = max(size, new.size)
        if self.rows is not None:
            target = self.rows.resolve(size, "--vocab", "rows of the vocabulary")
        target = padded(target, self.multiple)
        rows = rows_of_tokenizer(old, new, size, target, subwords=self.method == "subwords")
        config, lost = moved_ids(shape.config, rows)
        config, notes = special_ids(config, lost, files, new)
        if (generation := _generation(shape.folder, rows, files, new)) is not None:
            files[GENERATION] = generation
        return _growth(
            "tokenizer" if self.folder else "add_tokens",
            rows,
            self.method,
            _bias(shape, rows, self.method, self.share),
            fields={key: value for key, value in config.items() if value != shape.config.get(key)},
            files=files,
            warnings=(*notes, *_dropped(rows, new)),
        )


def make(row: OperatorRow, value: Any, request: GrowthRequest) -> Rows | Tokenizer | None:
    """The operator of a request: see the attributes of GrowthRequest."""
    method, multiple, share = request.vocab_init, request.pad_vocab_to, request.new_token_bias
    by_tokens = request.tokenizer or request.add_tokens
    if row.key == "vocab":
        return None if by_tokens else Rows(value, method, multiple, share)
    if row.key == "pad_vocab_to":
        return None if by_tokens or request.vocab else Rows(None, method, multiple, share)
    if row.key == "add_tokens" and request.tokenizer:
        return None
    rows = None if request.vocab is None else Amount.parse(request.vocab, "--vocab")
    folder = Path(request.tokenizer) if request.tokenizer else None
    added = Path(request.add_tokens) if request.add_tokens else None
    return Tokenizer(folder, added, rows, method, multiple, share)


def grows(row: OperatorRow, shape: ModelShape) -> bool:
    """Every model with an embedding of tokens."""
    return "vocab" in shape.sizes


def _bias(
    shape: ModelShape, rows: VocabularyRows, method: str, share: float | None
) -> dict[int, float]:
    """The bias of new tokens; none where no share was asked for.

    Raises:
        UsageError: the head has no bias, or the share of tokens that start so has no bound.
    """
    if share is None or not rows.new:
        return {}
    biases = [t for t in shape.family.tensors if shape.has(t.role) and _is_bias(t, shape.sizes)]
    if len(biases) != 1:
        stored = "stores no bias" if not biases else f"stores {len(biases)} biases"
        raise UsageError(
            f"--new-token-bias {share}: the head of {shape.family.name} {stored}.",
            "Leave it out; --vocab-init mean keeps new tokens as unlikely as an average one.",
        )
    if method not in BOUNDED:
        raise UsageError(
            f"--new-token-bias {share}: new rows by --vocab-init {method} have logits that nothing "
            "bounds.",
            f"Ask for --vocab-init {' or '.join(BOUNDED)}.",
        )
    return bias_for_share(rows, share)


def _is_bias(tensor: Tensor, sizes: Mapping[str, int]) -> bool:
    """A number a token."""
    return len(tensor.dims) == 1 and tensor.dims[0].layout(sizes).axes == ("vocab",)


def _growth(
    key: str, rows: VocabularyRows, method: str, bias: dict[int, float], **more: Any
) -> Effect:
    parts = []
    if rows.moved:
        parts.append(f"{rows.moved:,} rows moved")
    if rows.new:
        parts.append(f"{rows.new:,} new by {method}{' with a bias' if bias else ''}")
    if rows.dropped:
        parts.append(f"{len(rows.dropped):,} tokens dropped")
    detail = f" ({', '.join(parts)})" if parts else ""
    return Effect(
        operator=key,
        summary=f"vocabulary {rows.old_size:,} -> {rows.new_size:,} rows{detail}",
        axes={"vocab": AxisMap(rows.source, rows.old_size, partial=True)},
        new_units={"vocab": NewUnits(produced=Fill.TOKEN)},
        new_tokens=NewTokens(method, rows.parts, rows.old_tokens, bias),
        exactness=Exactness.BIT_EXACT,
        reason="on text of old tokens, hidden states and logits of old tokens keep their values",
        **more,
    )


def _dropped(rows: VocabularyRows, new: Tokens) -> tuple[str, ...]:
    if not rows.dropped:
        return ()
    shown = ", ".join(repr(token) for token in rows.dropped[:3])
    return (
        f"{len(rows.dropped):,} old tokens are not in the new tokenizer ({shown} ...): their rows "
        "are gone, and text that needs them is read as other tokens",
    )


def _generation(
    folder: Path, rows: VocabularyRows, files: dict[str, bytes], new: Tokens
) -> bytes | None:
    """generation_config.json with the new ids."""
    if not (folder / GENERATION).is_file():
        return None
    moved, lost = moved_ids(read_json_object(folder / GENERATION, non_finite=True), rows)
    moved, _ = special_ids(moved, lost, files, new)
    return (json.dumps(moved, indent=2, ensure_ascii=False) + "\n").encode()
