"""The attention of a study's models is measured on text that no arm was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from growkit.study.run_records import TEXT_OF_A_DOCUMENT, measures
from growkit.training.read_recipe import make_recipe
from growkit.training.recipe import Recipe


def recipe_of(folder: Path) -> Recipe:
    (folder / "train.txt").write_text("trained on " * 400)
    (folder / "valid.txt").write_text("held out " * TEXT_OF_A_DOCUMENT)
    return make_recipe(
        {
            "model": {"config": {"model_type": "gda"}},
            "tokenizer": {"bytes": True},
            "data": {
                "files": [str(folder / "train.txt")],
                "eval_files": [str(folder / "valid.txt")],
                "sequence_length": 32,
            },
            "training": {"max_steps": 1},
        }
    )


def test_attention_is_measured_on_held_out_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    class Suite:
        def figures(self) -> dict[str, float]:
            return {"entropy": 0.5, "lost": float("nan")}

    def suite(loaded: Any, **options: Any) -> Suite:
        given.update(options)
        return Suite()

    monkeypatch.setattr("growkit.evaluation.attention_suite", suite)
    monkeypatch.setattr("growkit.evaluation.model.load", lambda folder: folder)
    rows = [{"step": 1, "eval_loss": 1.5, "perplexity": 4.5, "eval_loss/a": 1.25}]
    found = measures(tmp_path, recipe_of(tmp_path), rows, ["attention"])
    assert found == {"perplexity": 4.5, "loss.a": 1.25, "entropy": 0.5}
    assert given["text"].startswith("held out held out")
    assert "trained" not in given["text"]
    assert len(given["text"]) == TEXT_OF_A_DOCUMENT
