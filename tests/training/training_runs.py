"""Tiny runs for the training tests: a Llama of a few thousand parameters on bytes."""

from __future__ import annotations

import random
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from growkit.training.checkpoints import list_checkpoints
from growkit.training.metrics import read_metrics
from growkit.training.read_recipe import make_recipe
from growkit.training.recipe import Recipe

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TINY_GDA = {
    "model_type": "gda",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_noise_heads": 1,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "noise_keys": "own",
    "sub_layer_norm": True,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}

needs_sharding = pytest.mark.skipif(
    tuple(map(int, version("transformers").split(".")[:2])) < (5, 23),
    reason="transformers trains models in parts from 5.23 on",
)


def write_text(path: Path, lines: int = 300) -> Path:
    """A small text of random words, the same every time."""
    words = ("the", "old", "king", "of", "France", "spoke", "to", "his", "daughter", "and", "wine")
    source = random.Random(1)
    rows = [" ".join(source.choice(words) for _ in range(8)) for _ in range(lines)]
    path.write_text("\n".join(rows) + "\n")
    return path


def recipe_values(text: Path, **training: Any) -> dict[str, Any]:
    """Plain values of a recipe: 12 steps of 2 x 2 sequences, saved every 3 steps."""
    return {
        "model": {"config": dict(TINY_LLAMA)},
        "tokenizer": {"bytes": True},
        "data": {"files": [str(text)], "sequence_length": 16, "max_eval_tokens": 160},
        "training": {
            "max_steps": 12,
            "learning_rate": 1e-2,
            "schedule": "wsd",
            "warmup_steps": 2,
            "decay_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 2,
            "eval_steps": 4,
            "save_steps": 3,
            "save_total_limit": 100,
            "use_cpu": True,
            "seed": 5,
            **training,
        },
    }


def make(text: Path, **training: Any) -> Recipe:
    """The recipe of :func:`recipe_values`."""
    return make_recipe(recipe_values(text, **training))


def figures(out: Path) -> list[dict[str, float]]:
    """The metrics of a run without the one that depends on the clock."""
    rows = read_metrics(out / "training" / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def weights(out: Path) -> bytes:
    """The bytes of the trained model."""
    return (out / "model.safetensors").read_bytes()


def cut_back(out: Path, step: int) -> None:
    """Make a finished run look as if it had been killed after the checkpoint of ``step``."""
    for checkpoint in list_checkpoints(out / "training" / "checkpoints"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    for path in out.iterdir():
        if path.is_file():
            path.unlink()


def assert_close(one: Path, other: Path, tolerance: float, relative: float = 0) -> None:
    """Same steps, losses within ``tolerance`` or ``relative`` of them; weights within both."""
    # The probes of a grown model see whole parameters only; a growth's line is for its own test.
    rows, others = (
        [r for r in figures(out) if not {"probe", "growth"} & r.keys()] for out in (one, other)
    )
    for row, expected in zip(rows, others, strict=True):
        assert row == pytest.approx(expected, abs=tolerance, rel=relative), row
    first, second = (load_file(out / "model.safetensors") for out in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert abs(value - second[name]).max() <= tolerance + relative, name
