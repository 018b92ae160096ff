"""The growth flags that ``plan`` and ``grow`` share; both end in the same GrowthRequest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from growkit.cli.common import complete_recipe, complete_words
from growkit.surgery.operators import all_options

if TYPE_CHECKING:
    from growkit.surgery.request import GrowthRequest

SIZES, CHOICES = "How large (x2, +4 or the new number)", "How"


def flags() -> dict[str, Any]:
    """Name of the request's field -> annotation of its flag, from the table of growths.

    A flag that is not given is None: the recipe's, or the default.
    """
    annotations = {}
    for option in all_options():
        name = [option.flag] if option.kind is bool else []  # without --no-...
        shown = typer.Option(
            *name,
            help=option.help,
            rich_help_panel=SIZES if option.size else CHOICES,
            autocompletion=complete_words(*option.values) if option.values else None,
        )
        annotations[option.key] = Annotated[option.kind | None, shown]
    return annotations


def growth_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the growth flags; it receives one argument ``request`` in their place."""
    # GrowthRequest is imported for type checkers alone, so its name cannot be evaluated here.
    command.__annotations__.pop("request")
    own = inspect.signature(command, eval_str=True)
    annotations = flags()
    of_growth = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in annotations.items()
    ]
    recipe = inspect.Parameter(
        "recipe",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option(
                help="YAML file with a 'grow' section, or a name from 'growkit recipes'; flags win "
                "over it.",
                autocompletion=complete_recipe("grow"),
            ),
        ],
    )

    @wraps(command)
    def wrapper(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in annotations}
        command(request=_request(given, arguments.pop("recipe")), **arguments)

    kept = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.parameters.items()
        if name != "request"
    ]
    parameters = [kept[0], *of_growth, recipe, *kept[1:]]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _request(given: dict[str, Any], recipe: Path | None) -> GrowthRequest:
    from dataclasses import replace

    from growkit.recipe.shipped import find_recipe
    from growkit.surgery.request import GrowthRequest, read_recipe

    values = {name: value for name, value in given.items() if value is not None}
    asked = GrowthRequest.from_mapping(values)
    if recipe is None:
        return asked
    return replace(
        read_recipe(find_recipe(recipe, "grow")), **{key: getattr(asked, key) for key in values}
    )
