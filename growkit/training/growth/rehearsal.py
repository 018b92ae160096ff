"""Every growth of a staged run on paper, before its first step."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError
from growkit.core.names import CONFIG
from growkit.surgery.plan import declare_tensors, plan_growth
from growkit.training.recipe import Recipe


def rehearse(recipe: Recipe) -> None:
    """Plan every growth on the config alone, one after another.

    Raises:
        UsageError: a growth that its model cannot have, named by its stage.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / CONFIG).write_text(json.dumps(first_config(recipe)))
        for number, stage in enumerate(recipe.stages):
            request = stage.request()
            with open_checkpoint(folder, require_tensors=False) as checkpoint:
                try:
                    declare_tensors(checkpoint)
                    plan = plan_growth(checkpoint, request)
                except UsageError as error:
                    raise UsageError(
                        f"stages[{number}] cannot be done. {error.cause}", error.remedy
                    ) from error
            (folder / CONFIG).write_text(json.dumps(plan.config))


def first_config(recipe: Recipe) -> dict[str, Any]:
    """config.json of the model that the run starts from; its vocabulary may be another."""
    if recipe.model.checkpoint is not None:
        with open_checkpoint(recipe.model.checkpoint) as checkpoint:
            return checkpoint.config
    from growkit.training.models import make_config
    from growkit.verification.loading import register_own_models

    class NoTokens:
        """The vocabulary changes no growth."""

        def __len__(self) -> int:
            return 256

    assert recipe.model.config is not None
    register_own_models()
    config: dict[str, Any] = make_config(recipe.model.config, NoTokens()).to_dict()
    return config
