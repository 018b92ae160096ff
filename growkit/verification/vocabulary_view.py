"""Two models of different vocabularies, seen through the tokens that both have.

Growing a vocabulary is exact in this sense: on text of old tokens the hidden states are equal, and
so are the logits of old tokens. What the new rows take from the softmax is measured beside it: with
a share p of the probability on new tokens, every old token has 1 - p of what it had, and the KL
divergence from A, over the old tokens, is -log(1 - p).

The two tokenizers on disk say which rows belong together; the plan is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from growkit.core.errors import UsageError
from growkit.samples import sample_text
from growkit.verification.layerwise import LayerwiseModel
from growkit.verification.model_inputs import is_encoder_decoder
from growkit.verification.report import VocabularyFigures
from growkit.verification.windows import Encode, encoder
from growkit.verification.written_folder import Folder
from growkit.vocabulary.embedding_rows import NEW, VocabularyRows, rows_of_size, rows_of_tokenizer
from growkit.vocabulary.tokens import read_tokens

_ID_FIELDS = ("_token_id", "_token_ids")


@dataclass
class _Share:
    """Probability on the tokens that only B has, position by position."""

    positions: int = 0
    total: float = 0.0
    largest: float = 0.0
    divergence: float = 0.0

    def add(self, logits: torch.Tensor, kept: torch.Tensor) -> None:
        every = logits.float().logsumexp(-1)
        log_kept = (logits[..., kept].float().logsumexp(-1) - every).clamp(max=0.0)
        share = -torch.expm1(log_kept)
        self.positions += share.numel()
        self.total += float(share.sum())
        self.largest = max(self.largest, float(share.max()))
        self.divergence -= float(log_kept.sum())


@dataclass
class VocabularyView:
    """The common tokens, numbered 0, 1, ...; models that are seen through it know these alone.

    Attributes:
        rows: how the rows of B come from those of A.
        ids_a, ids_b: row of A and of B of each common token; int64 [tokens].
        config_a: A's config, whose special tokens both are run with.
    """

    rows: VocabularyRows
    ids_a: torch.Tensor
    ids_b: torch.Tensor
    config_a: Any
    share: _Share = field(default_factory=_Share)
    bits: tuple[float | None, ...] = (None, None)

    @staticmethod
    def between(a: Folder, b: Folder, size_a: int, size_b: int, config_a: Any) -> VocabularyView:
        """Match two folders by their tokenizers; without any, the first rows are the old ones.

        Raises:
            UsageError: B has fewer rows and no tokenizer says which, or only one folder has a
                tokenizer.
        """
        if a.has_tokenizer != b.has_tokenizer:
            raise UsageError(
                f"The vocabularies differ, {size_a} and {size_b} tokens, and only one of the "
                "folders has a tokenizer.",
                "Put the tokenizer's files beside the weights of the other.",
            )
        if a.has_tokenizer:
            old, new = read_tokens(a.path), read_tokens(b.path)
            rows = rows_of_tokenizer(old, new, size_a, size_b, subwords=False)
        else:
            rows = rows_of_size(size_a, size_b)
        kept = (rows.place != NEW).nonzero()[0]
        ids_a, ids_b = (torch.from_numpy(ids) for ids in (kept, rows.place[kept]))
        return VocabularyView(rows, ids_a, ids_b, config_a)

    def encoder(self, encode: Encode) -> Encode:
        """A's encoding in the numbers of the view; tokens without a row in both are left out."""
        number = torch.full((self.rows.old_size,), -1)
        number[self.ids_a] = torch.arange(len(self.ids_a))

        def encoded(text: str) -> list[int]:
            ids = encode(text)
            known = [id for id in ids if id < len(number)]  # A's own tokenizer may have more
            return [n for n in number[torch.tensor(known, dtype=torch.long)].tolist() if n >= 0]

        return encoded

    def attach(self, model: Any, which: str) -> None:
        """Let a model take and give the tokens of the view; ``which`` is ``a`` or ``b``."""
        ids = self.ids_a if which == "a" else self.ids_b
        module = model.model if isinstance(model, LayerwiseModel) else model
        self._number_specials(module)

        def before(_: Any, args: tuple[Any, ...]) -> Any:
            return (ids[args[0]], *args[1:])

        def after(_: Any, args: Any, output: Any) -> Any:
            if which == "b" and self.rows.new_size > len(ids):
                self.share.add(output.logits, ids)
            output.logits = output.logits[..., ids]
            return output

        # At the table, not at the model: generation calls the encoder of a T5 by itself.
        table = module.get_input_embeddings()
        for part in module.modules():
            if part is table or (isinstance(part, nn.Embedding) and part.weight is table.weight):
                part.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _number_specials(self, model: Any) -> None:
        """Special tokens by their number in the view, in the model's config and generation."""
        number = {int(old): n for n, old in enumerate(self.ids_a)}
        for key, value in self.config_a.to_dict().items():
            if key.endswith(_ID_FIELDS):
                several = isinstance(value, Sequence)
                known = [number[v] for v in (value if several else [value]) if v in number]
                for target in (model.config, model.generation_config):
                    setattr(target, key, known if several else known[0] if known else None)

    def start(
        self,
        models: tuple[Any, Any],
        tokenizers: Sequence[Any | None],
        text: str | None,
        tokens: int,
        window: int,
    ) -> None:
        """Measure bits per byte in each folder's own tokens, then attach both models."""
        whole = [not isinstance(model, LayerwiseModel) for model in models]
        if all(whole) and None not in tokenizers and not is_encoder_decoder(models[0]):
            sample = (text or sample_text())[: 4 * tokens]
            self.bits = tuple(
                bits_per_byte(model, encoder(tokenizer, 0)(sample), sample, window)
                for model, tokenizer in zip(models, tokenizers, strict=True)
            )
        for model, which in zip(models, ("a", "b"), strict=True):
            self.attach(model, which)

    def figures(self) -> VocabularyFigures:
        """What was found."""
        share, n = self.share, max(1, self.share.positions)
        return VocabularyFigures(
            rows_a=self.rows.old_size,
            rows_b=self.rows.new_size,
            common=len(self.ids_a),
            new=self.rows.new,
            dropped=len(self.rows.dropped),
            new_token_share=share.total / n,
            largest_new_token_share=share.largest,
            kl_of_old_tokens=share.divergence / n,
            bits_per_byte_a=self.bits[0],
            bits_per_byte_b=self.bits[1],
        )


def bits_per_byte(model: Any, ids: Sequence[int], text: str, length: int) -> float | None:
    """Bits of a text's UTF-8 byte under a model that has not been given a view; None where the
    text has tokens that the model has no rows for.

    Args:
        ids: the whole text's token ids; read in windows of ``length``, each without the others.
    """
    nats = 0.0
    predicted = 0
    if max(ids, default=0) >= model.get_input_embeddings().weight.shape[0]:
        return None
    for first in range(0, len(ids) - 1, length):
        window = torch.tensor([list(ids[first : first + length])])
        if window.shape[1] < 2:
            break
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].double()
        nats -= float(logits.log_softmax(-1).gather(-1, window[0, 1:, None]).sum())
        predicted += window.shape[1] - 1
    if not predicted:
        return None
    size = len(text.encode()) * predicted / len(ids)
    return nats / (size * math.log(2))
