"""The content key of a training run: what its result depends on, and nothing else. No torch.

Finished runs are found again by their key, so a value that is added to it makes all of them anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growkit.study.recipe import Base, Start, StudyRecipe
from growkit.study.shapes import digest
from growkit.training.run_folder import MAY_CHANGE

FORMAT = 1
# Of the data section: where things are, and how many processes read them. Their content is hashed.
PLACES = ("files", "eval_files", "cache_dir", "workers")
# These may differ between a run and its continuation, and yet say what the run is.
LENGTH = ("max_steps", "max_tokens")


def content_key(
    recipe: Mapping[str, Any],
    start: Start,
    study: StudyRecipe,
    fingerprints: Mapping[str, str],
    parent: str | None,
) -> str:
    """A hash of all that the result of a run depends on; intervals of logging and places do not.

    The sources of a mixture are hashed with the paths that the recipe gives them (as the name that
    a source has), so a mixture under other paths is made again.

    Args:
        recipe: of the training run.
        fingerprints: of data, tokenizer and checkpoints (:mod:`growkit.study.inputs`).
        parent: key of the run that this one goes on from.
    """
    training = {
        key: value
        for key, value in recipe["training"].items()
        if f"training.{key}" not in MAY_CHANGE or key in LENGTH
    }
    training.pop("use_cpu", None)
    if start.checkpoint is not None:
        parent = fingerprints[str(start.checkpoint)]
    return digest(
        {
            **_observed(start, study),
            "format": FORMAT,
            "model": recipe["model"],
            "data": {key: value for key, value in recipe["data"].items() if key not in PLACES},
            "training": training,
            "position": recipe.get("position"),
            "content": fingerprints["data"],
            "tokenizer": fingerprints.get("tokenizer"),
            "change": start.change,
            "parent": parent,
        }
    )


def _observed(start: Start, study: StudyRecipe) -> dict[str, list[str]]:
    """Figures besides the loss belong to the result of an arm: a run without them is another."""
    if isinstance(start, Base):
        return {}
    asked: dict[str, list[str]] = {"measures": [*study.measures], "series": [*study.series]}
    return {name: value for name, value in asked.items() if value}
