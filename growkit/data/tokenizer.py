"""Tokenizers of a run: a folder's own, a BPE trained on the data, or plain bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from growkit.checkpoint.links import check_links
from growkit.core.errors import UsageError
from growkit.core.files import read_bytes, read_text
from growkit.core.json_files import read_json_object
from growkit.vocabulary.tokenizer_files import MAX_TOKENIZER_BYTES, TEMPLATES, tokenizer_files

END_OF_TEXT = "<|endoftext|>"


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files as bytes."""
    check_links(source)
    for path in tokenizer_files(source):
        shutil.copyfile(path, target / path.name)


def with_template(source: Path, template: Path, target: Path) -> Path:
    """A copy of a tokenizer with another chat template; the folder ``target``, made anew."""
    text = read_text(template, error=UsageError, remedy="Set data.chat_template to a Jinja file.")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_tokenizer(source, partial)
    for name in TEMPLATES:
        (partial / name).unlink(missing_ok=True)
    config_file = partial / "tokenizer_config.json"
    if config_file.is_file():
        config = read_json_object(config_file)
        if config.pop("chat_template", None) is not None:
            config_file.write_text(json.dumps(config, indent=2) + "\n")
    (partial / TEMPLATES[0]).write_text(text, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target


def tokenizer_fingerprint(folder: Path) -> str:
    """A hash of the tokenizer's files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in tokenizer_files(folder):
        digest.update(path.name.encode() + read_bytes(path, limit=MAX_TOKENIZER_BYTES))
    return digest.hexdigest()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer from a folder, offline.

    Raises:
        UsageError: there is none, or it cannot be loaded.
    """
    remedy = "Set tokenizer.path, tokenizer.train_bpe (a vocabulary size) or tokenizer.bytes: true."
    if not tokenizer_files(folder):
        raise UsageError(f"{str(folder)!r} holds no tokenizer.", remedy)
    check_links(folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers raises bare Exceptions for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"The tokenizer in {str(folder)!r} cannot be loaded: {reason}", remedy
        ) from error


def train_bpe(documents: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer and save it as a folder that AutoTokenizer loads.

    A vocabulary of 257 is the 256 bytes and the end-of-text token: no merges, nothing to learn.
    Any text is representable, and the same documents give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents if vocab_size > 257 else [], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
