"""Continual pretraining on local text, on transformers' Trainer.

`load_recipe` reads a YAML recipe (no torch), `train` runs it; `growkit.training.demo.run_demo` is
the main job end to end on the built-in text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from growkit.core.progress import Reporter, Silent
from growkit.core.worker import importing
from growkit.training.read_recipe import load_recipe
from growkit.training.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from growkit.training.run_result import TrainingResult

__all__ = ["Recipe", "Reporter", "Silent", "load_recipe", "train"]


def train(recipe: Recipe, out: Path, **options: Any) -> TrainingResult:
    """Run a recipe; see :func:`growkit.training.run.train` (torch is imported only here)."""
    with importing():
        from growkit.training import trainer  # noqa: F401 - with transformers, which takes longest
        from growkit.training.run import train as run

    return run(recipe, out, **options)
