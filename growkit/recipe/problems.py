"""From a recipe that cannot be used to one sentence: which key, on which line, and what instead."""

from __future__ import annotations

import typing
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from growkit.core.errors import UsageError, nearest

Recipe = TypeVar("Recipe", bound=BaseModel)


def _line(text: str, location: tuple[int | str, ...]) -> str:
    """``" line 7"`` of a key in the YAML text, or nothing when it is not in the text."""
    node = yaml.compose(text, Loader=yaml.SafeLoader) if text else None
    line = None
    for step in location:
        if isinstance(node, yaml.MappingNode):
            pair = next((p for p in node.value if p[0].value == str(step)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step] if step < len(node.value) else None
        else:
            break
    return "" if line is None else f" line {line}"


def _sections_in(annotation: object) -> list[type[BaseModel]]:
    """The section classes that a field's type names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _sections_in(part)]


def _section_of(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section class in which the last key of ``location`` stands."""
    for step in location[:-1]:
        field = model.model_fields.get(str(step))
        found = _sections_in(field.annotation) if field is not None else []
        if found:
            model = found[0]
    return model


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def explain(error: ValidationError, model: type[BaseModel], source: str, text: str) -> UsageError:
    """The first problem of a validation error as a usage error."""
    # An unknown key is the likeliest reason for whatever else is reported (a missing one, say).
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    location = problem["loc"]
    where = f"{source}{_line(text, location)}"
    dotted = ".".join(str(step) for step in location)
    if problem["type"] == "extra_forbidden":
        valid = _keys(_section_of(model, location))
        prefix = ".".join(str(step) for step in location[:-1])
        place = f"section {prefix!r}" if prefix else "the recipe"
        return UsageError(
            f"{where}: unknown key {str(location[-1])!r} in {place}.",
            f"{nearest(str(location[-1]), valid)}Valid keys: {', '.join(valid)}.",
        )
    if problem["type"] == "missing":
        return UsageError(f"{where}: {dotted!r} is missing.", "Add it to the recipe.")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        place = f"section {dotted!r}" if dotted else "the recipe"
        return UsageError(
            f"{where}: {place} cannot be used.", message[:1].upper() + message[1:] + "."
        )
    return UsageError(f"{where}: {dotted} is {problem['input']!r}.", f"{message}.")


def validated(model: type[Recipe], values: object, source: str, text: str) -> Recipe:
    """A mapping as a recipe of class ``model``.

    Args:
        text: the YAML it came from, for line numbers in errors.

    Raises:
        UsageError: naming the key, its line, and the nearest valid key of an unknown one.
    """
    if not isinstance(values, dict):
        raise UsageError(
            f"{source} does not hold a YAML mapping.",
            f"Its sections are {', '.join(model.model_fields)}.",
        )
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, model, source, text) from None
