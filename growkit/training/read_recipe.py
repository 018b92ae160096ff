"""A training recipe from a YAML file: read, overridden, checked. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growkit.core.errors import UsageError
from growkit.core.files import read_text
from growkit.core.yaml_files import MAX_YAML_BYTES, RECIPE_REMEDY, IncrementLoader, parse_yaml
from growkit.recipe.section import validated
from growkit.training.recipe import Recipe
from growkit.training.recipe_checks import (
    check_averaging,
    check_schedule,
    check_stages,
    check_thaw,
)


def make_recipe(
    values: Any, source: str = "recipe", text: str = "", overrides: Sequence[str] = ()
) -> Recipe:
    """Check a mapping.

    Args:
        text: the YAML it came from, for line numbers in errors.
        overrides: those that were applied to it, to be named in errors.

    Raises:
        UsageError: naming the key, its line, and the nearest valid key of an unknown one.
    """
    recipe = validated(Recipe, values, source, text, overrides)
    check_schedule(recipe, source)
    check_thaw(recipe, source)
    check_averaging(recipe, source)
    check_stages(recipe, source)
    return recipe


def load_recipe(path: Path, overrides: Sequence[str] = (), max_steps: int | None = None) -> Recipe:
    """Read a YAML recipe and apply ``key.path=value`` overrides (values are YAML).

    Raises:
        UsageError: the file cannot be read, is not YAML, or says something that no recipe can.
    """
    values, text = read_values(path, overrides)
    if max_steps is not None and isinstance(values, dict):
        training = values.setdefault("training", {})
        if isinstance(training, dict):
            training.pop("max_tokens", None)
            training["max_steps"] = max_steps
    return make_recipe(values, str(path), text, overrides)


def read_values(path: Path, overrides: Sequence[str]) -> tuple[Any, str]:
    """The content of a YAML file with ``key.path=value`` overrides applied, and its text.

    Raises:
        UsageError: the file cannot be read or is not YAML, or an override cannot be applied.
    """
    text = read_text(path, limit=MAX_YAML_BYTES, error=UsageError, remedy=RECIPE_REMEDY)
    values = parse_yaml(text, str(path), IncrementLoader)
    for override in overrides:
        _apply(values, override)
    return values, text


def _apply(values: Any, override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UsageError(
            f"--set {override!r} is not of the form key.path=value.",
            "For example --set training.learning_rate=1e-3.",
        )
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(values, dict) and values.get(parent) is None:
            values[parent] = {}
        place = _place(values, parent)
        values = None if place is None else values[place]
    place = _place(values, last)
    if place is None:
        raise UsageError(
            f"--set {override!r} goes into a value that is no mapping, or behind a list's end.",
            "Its dots name nested sections, and numbers the entries of a list from 0 on, as in "
            "training.learning_rate and data.mixture.0.weight.",
        )
    values[place] = parse_yaml(value, f"The value of --set {override!r}")


def _place(values: Any, word: str) -> str | int | None:
    """The key or position that a word of a path means; None where there is no such place."""
    if isinstance(values, list) and word.isdecimal() and int(word) < len(values):
        return int(word)
    return word if isinstance(values, dict) else None
