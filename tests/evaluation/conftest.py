"""A tiny checkpoint that can be evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoints import gda_config, make_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GDA checkpoint with a tokenizer whose tokens are bytes."""
    path = tmp_path_factory.mktemp("eval") / "ckpt"
    make_folder(path, gda_config())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
