"""A grown folder becomes a GGUF file by llama.cpp's own converter, and computes the same from it.

The converter is run as llama.cpp ships it, out of the source package of llama-cpp-python; where the
registry has none, the tests are skipped. ``LLAMA_CPP`` names another copy.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from numpy.random import default_rng
from real.smollm2 import read_once
from tiny_checkpoints import (
    STD,
    gda_config,
    grow,
    llama_config,
    make_folder,
    make_tensors,
    write_folder,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

CACHE = Path(__file__).parents[2] / ".cache"

pytestmark = pytest.mark.real

PACKAGE = "llama-cpp-python==0.3.36"
SCRIPT = "convert_hf_to_gguf.py"
PARTS = (SCRIPT, "conversion", "gguf-py")
TEXT = "The three primary colours\nare 1234 red, növekedés and <|im_start|>blue."


@pytest.fixture(scope="module")
def converter() -> Path:
    """The converter's script, with the modules that it needs beside it; fetched once."""
    stated = os.environ.get("LLAMA_CPP")
    folder = Path(stated) if stated else CACHE / "llama.cpp"
    if not stated:
        CACHE.mkdir(exist_ok=True)
        with open(CACHE / "llama.cpp.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / SCRIPT).is_file():
                _fetch(folder)
    return folder / SCRIPT


def _fetch(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        source = ["--no-deps", "--no-binary", "llama-cpp-python", "--dest", work, PACKAGE]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", *source]
        if subprocess.run(pip, check=False).returncode:
            pytest.skip(f"the package registry gives no source of {PACKAGE}")
        (package,) = Path(work).glob("*.tar.gz")
        with tarfile.open(package) as archive:
            inner = f"{package.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
            wanted = tuple(inner + part for part in PARTS)
            members = [m for m in archive if m.name.startswith(wanted)]
            archive.extractall(work, members=members, filter="data")
        shutil.move(Path(work) / inner, folder)


def convert(script: Path, folder: Path, out: Path) -> str:
    """stderr of the converter; float32 in the file, as in the folder."""
    command = [sys.executable, str(script), str(folder), "--outfile", str(out), "--outtype", "f32"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def add_tokenizer(folder: Path, smollm2: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, folder)
    return folder


@pytest.fixture(autouse=True)
def each_file_is_read_once() -> Iterator[None]:
    with read_once():
        yield


def test_a_grown_llama_converts_and_computes_the_same(
    smollm2: Path, converter: Path, tmp_path: Path
) -> None:
    config = llama_config(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    source, grown = tmp_path / "source", tmp_path / "grown"
    tokenizer = AutoTokenizer.from_pretrained(add_tokenizer(_wide(source, config), smollm2))
    grow(source, grown, layers="+1", query_heads="x2", kv_heads="x2", ffn="x1.5")
    log = convert(converter, grown, tmp_path / "grown.gguf")
    assert (tmp_path / "grown.gguf").is_file(), log

    fields = gguf.GGUFReader(tmp_path / "grown.gguf").fields
    stated = {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 144,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 100_000.0,
        "llama.vocab_size": 49152,
        "tokenizer.ggml.pre": "smollm",
    }
    assert {name: fields[name].contents() for name in stated} == stated
    tokens = tokenizer.convert_ids_to_tokens(range(49152))
    assert fields["tokenizer.ggml.tokens"].contents() == tokens
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template

    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="grown.gguf")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert read(TEXT, return_tensors="pt").input_ids.tolist() == ids.tolist()
    logits = [
        _logits(ids, source),
        _logits(ids, grown),
        _logits(ids, tmp_path, gguf_file="grown.gguf", dtype=torch.float32),
    ]
    assert torch.equal(logits[1], logits[2])
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-5, atol=1e-5 * logits[0].abs().max())


def test_the_converter_refuses_attention_of_ours(
    smollm2: Path, converter: Path, tmp_path: Path
) -> None:
    """By name, before it reads a weight: nothing that computes another function is written."""
    folder = add_tokenizer(make_folder(tmp_path / "gda", gda_config()), smollm2)
    assert "GdaForCausalLM is not supported" in convert(converter, folder, tmp_path / "gda.gguf")
    assert not (tmp_path / "gda.gguf").exists()


def _wide(path: Path, config: dict[str, Any]) -> Path:
    """A random folder; ``tiny_checkpoints`` writes a vocabulary of 256."""
    tensors = make_tensors(config)
    rows = default_rng(1).standard_normal((config["vocab_size"], config["hidden_size"]))
    tensors["model.embed_tokens.weight"] = (STD * rows).astype("float32")
    return write_folder(path, config, tensors)


def _logits(ids: torch.Tensor, folder: Path, **options: object) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(ids).logits
