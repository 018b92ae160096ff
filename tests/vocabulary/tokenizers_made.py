"""Small tokenizers of the kinds that people have, trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

ENGLISH = ("the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 4).split(". ")
GERMAN = (
    "der schnelle braune Fuchs springt über den faulen Hund, und der Hund schläft weiter. "
    "Straßenbahnhaltestellen und Geschwindigkeitsbegrenzungen gibt es in größeren Städten. "
) * 6


def byte_level(folder: Path, texts: Iterable[str] = ENGLISH, size: int = 300) -> Path:
    """GPT-2's kind, with one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return saved(tokenizer, folder, eos_token="<|end|>")


def metaspace(folder: Path, texts: Iterable[str] = ENGLISH, size: int = 320) -> Path:
    """Llama 2's kind: a space is U+2581, a byte without a character is <0x..>; the whole text is
    one piece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = None
    # Byte tokens belong to the model, as in Llama 2, and are no added tokens.
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < 2]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    return saved(tokenizer, folder, eos_token="</s>", unk_token="<unk>")


def saved(tokenizer: Tokenizer, folder: Path, **special: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def with_added(source: Path, folder: Path, *tokens: str, special: bool = True) -> Path:
    """The same tokenizer with added tokens behind the others."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, special=special) for token in tokens])
    return saved(tokenizer, folder, eos_token="<|end|>")
