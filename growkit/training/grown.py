"""What a run knows of the growth that its checkpoint came from: growkit.json's new-parameter map.

No torch here. growkit.json goes along with every trained folder, so a run that continues a trained
one has the same map: new are the slots of the last growth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from growkit.errors import UsageError
from growkit.surgery.manifest import MANIFEST, read_manifest
from growkit.surgery.trained_tokens import trained_tokens

if TYPE_CHECKING:
    from growkit.training.recipe import Recipe


def new_parameters_of(recipe: Recipe) -> dict[str, Any]:
    """The new-parameter map of the run's source; empty where it was not grown.

    Raises:
        UsageError: the recipe treats new slots differently, and nothing says which those are.
    """
    source = recipe.model.checkpoint
    found: dict[str, Any] = {}
    if source is not None:
        found = (read_manifest(source) or {}).get("new_parameters") or {}
    if not found and recipe.training.uses_new_parameter_map:
        where = "a model from scratch" if source is None else repr(str(source))
        reason = (
            "has no new parameters"
            if source is None or (source / MANIFEST).is_file()
            else f"has no {MANIFEST}, which lists its new parameters"
        )
        raise UsageError(
            f"The recipe trains new and old slots differently, and {where} {reason}.",
            "Start from a folder that growkit grow wrote (or a run that continued one), or set "
            "training.train: all without multipliers and warm-ups of new or old slots.",
        )
    return found


def tokens_with_source(recipe: Recipe, tokens: int) -> int | None:
    """Tokens of a run and of all training before it; None where that is not known."""
    source = recipe.model.checkpoint
    if source is None:
        return tokens
    before = recipe.model.trained_tokens
    before = trained_tokens(source) if before is None else before
    return None if before is None else before + tokens
