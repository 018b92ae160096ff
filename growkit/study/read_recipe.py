"""A study recipe from a YAML file: read, overridden, checked. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growkit.recipe.problems import validated
from growkit.study.checks import check_data, check_references, check_training
from growkit.study.recipe import StudyRecipe
from growkit.training.read_recipe import read_values


def make_study(values: Any, source: str = "study", text: str = "") -> StudyRecipe:
    """Check a mapping; ``text`` is the YAML it came from, for line numbers in errors.

    Raises:
        UsageError: naming the key, its line, and the nearest valid key of an unknown one.
    """
    study = validated(StudyRecipe, values, source, text)
    check_data(study, source)
    check_training(study, source)
    check_references(study, source)
    return study


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyRecipe:
    """Read a YAML recipe and apply ``key.path=value`` overrides (values are YAML).

    Raises:
        UsageError: the file cannot be read, is not YAML, or says something that no study can.
    """
    values, text = read_values(path, overrides)
    return make_study(values, str(path), text)
