"""Every private piece of transformers that growkit uses is in the installed one, as listed."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
import transformers
from transformers import Trainer

import growkit
from growkit.model_code import exported as internals

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(growkit.__file__).parent


def minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def test_the_installed_version_was_checked() -> None:
    assert minor(transformers.__version__) in map(minor, internals.CHECKED_VERSIONS)


def test_pyproject_admits_what_was_checked_and_nothing_newer() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    found = re.search(r'"transformers>=([\d.]+),<([\d.]+)"', text)
    assert found is not None
    checked = sorted(map(minor, internals.CHECKED_VERSIONS))
    assert minor(found[1]) == checked[0]
    assert minor(found[2]) == (checked[-1][0], checked[-1][1] + 1)


@pytest.mark.parametrize("name", internals.TRAINER_METHODS)
def test_trainer_methods_have_the_listed_arguments(name: str) -> None:
    arguments = list(inspect.signature(getattr(Trainer, name)).parameters)[1:]
    assert tuple(arguments) == internals.TRAINER_METHODS[name]


def test_trainer_uses_the_listed_attributes() -> None:
    source = inspect.getsource(Trainer)
    for name in internals.TRAINER_ATTRIBUTES:
        assert f"self.{name} = " in source


def test_newer_methods_are_there_from_their_version_on() -> None:
    installed = minor(transformers.__version__)
    for name, has_it in internals.NEWER_TRAINER_METHODS.items():
        assert hasattr(Trainer, name) or installed < minor(has_it)


@pytest.mark.parametrize("module", internals.MODEL_NAMES)
def test_models_find_what_they_build_on(module: str) -> None:
    found = importlib.import_module(f"transformers.{module}")
    assert [name for name in internals.MODEL_NAMES[module] if not hasattr(found, name)] == []


def test_nothing_private_is_used_that_is_not_listed() -> None:
    """Overridden private methods of Trainer, and names that the models import."""
    training = "".join(p.read_text("utf-8") for p in (PACKAGE / "training").glob("*.py"))
    listed = {*internals.TRAINER_METHODS, *internals.NEWER_TRAINER_METHODS}
    private = {name for name in vars(Trainer) if name.startswith("_") and not name.endswith("__")}
    used = set(re.findall(r"def (_\w+)\(", training)) & private
    assert used - listed == set()
    listed_names = {name for names in internals.MODEL_NAMES.values() for name in names}
    for room in ("attention", "modeling"):
        for path in (PACKAGE / room).glob("[!_]*.py"):
            text = path.read_text("utf-8")
            imports = re.findall(r"^from transformers\.\S+ import (\([^)]*\)|.*)$", text, re.M)
            names = {name for found in imports for name in re.findall(r"\w+", found)}
            assert names - listed_names == set(), path.name
