"""Models whose retrieval and whose attention are known, because they are written down."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from growkit.evaluation.model import LoadedModel

LENGTH = 512


class _Config(SimpleNamespace):
    def get_text_config(self, decoder: bool = False) -> _Config:
        return self


class KnownAttention(nn.Module):
    """Returns the maps that it is told to, as attention modules of transformers do."""

    def forward(self, hidden_states: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, maps


class KnownModel(nn.Module):
    """No weights; ``kind`` says what it does.

    * ``induction``: continues the longest ending of the text that stood before, as it went on
      there; head 0 attends to what it copies, head 1 evenly.
    * ``beside``: the same, but looks at the token before the one that it copies.
    * ``random``: logits that depend on the last token alone, drawn from a seed.
    * ``even``: all logits are equal.
    """

    def __init__(self, kind: str, vocab: int) -> None:
        super().__init__()
        self.kind, self.vocab = kind, vocab
        self.attention = KnownAttention()
        self.config = _Config(
            vocab_size=vocab,
            max_position_embeddings=LENGTH,
            is_encoder_decoder=False,
            _attn_implementation="eager",
            num_hidden_layers=1,
            model_type="known",
        )
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(vocab, vocab, generator=generator)

    @classmethod
    def loaded(cls, tokenizer: PreTrainedTokenizerFast, kind: str) -> LoadedModel:
        model = cls(kind, len(tokenizer)).eval()
        return LoadedModel(Path("known"), model, tokenizer, torch.device("cpu"), "float32")

    @property
    def base_model(self) -> KnownModel:
        return self

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        if self.kind in ("random", "even"):
            logits = self.table[input_ids] * (self.kind == "random")
            n = input_ids.shape[1]
            even = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
            self.attention(hidden_states=logits, maps=even.expand(1, 2, n, n))
            return SimpleNamespace(logits=logits, past_key_values=None)
        logits = torch.zeros(*input_ids.shape, self.vocab)
        for row, ids in enumerate(input_ids.tolist()):
            sources = [self._source(ids[: end + 1]) for end in range(len(ids))]
            for end, source in enumerate(sources):
                logits[row, end, ids[source]] = 10.0
            self.attention(hidden_states=logits, maps=self._maps(sources))
        return SimpleNamespace(logits=logits, past_key_values=None)

    def _maps(self, sources: list[int]) -> Tensor:
        n = len(sources)
        even = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
        copied = torch.zeros(n, n)
        shift = self.kind == "beside"
        for end, source in enumerate(sources):
            copied[end, max(0, source - shift)] = 1.0
        return torch.stack([copied, even])[None]

    @staticmethod
    def _source(ids: list[int]) -> int:
        """Where the token stands that followed the longest earlier match of the end; 0 if none."""
        best, found = 0, 0
        for end in range(len(ids) - 1):
            size = 0
            while size <= end and ids[end - size] == ids[-1 - size]:
                size += 1
            if size > best:
                best, found = size, end + 1
        return found
