"""The growth flags that ``plan`` and ``grow`` share; both end in the same GrowthRequest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from growkit.surgery.request import GrowthRequest

SIZES, CHOICES = "How large (x2, +4 or the new number)", "How"


def _size(help_text: str) -> Any:
    return Annotated[str | None, typer.Option(help=help_text, rich_help_panel=SIZES)]


def _choice(help_text: str) -> Any:
    return Annotated[str | None, typer.Option(help=help_text, rich_help_panel=CHOICES)]


# Name of the request's field -> annotation of the flag. None means: the recipe's or the default.
FLAGS: dict[str, Any] = {
    "signal_heads": _size("Signal heads; the noise heads stay (group-differentiated growth)."),
    "noise_heads": _size("Noise heads; the signal heads stay."),
    "uniform_heads": _size("Signal and noise heads at the same ratio (count both)."),
    "heads": _size("Query and key/value heads at their ratio (count the query heads)."),
    "query_heads": _size("Query heads; the key/value heads and the KV cache stay."),
    "kv_heads": _size("Key/value heads (pairs, in differential attention); the KV cache grows."),
    "head_dim": _size("Channels a head; not under plain rotary position encoding."),
    "layers": _size("Layers (encoder's, where there are two stacks); see --depth-method."),
    "layers_from": _size("Slices of the layers, half-open: 0-24,8-32. Another function."),
    "decoder_layers": _size("Layers of an encoder-decoder's decoder."),
    "ffn": _size("FFN width (intermediate_size)."),
    "hidden": _size("Hidden size: whole multiples by copies, any other by padding."),
    "experts": _size("Experts: copies of the FFN with a new router, or copies of experts."),
    "experts_per_token": Annotated[
        int | None,
        typer.Option(
            help="Experts a token is routed to. Default: 2, or as many times more as experts.",
            rich_help_panel=SIZES,
        ),
    ],
    "expert_reinit": Annotated[
        float | None,
        typer.Option(
            help="Part of each new expert's FFN units that is drawn anew (Drop-Upcycling); not "
            "exact. Default: 0.",
            rich_help_panel=CHOICES,
        ),
    ],
    "untie_embeddings": Annotated[
        bool | None,
        typer.Option(
            "--untie-embeddings",
            help="Write an output projection of its own, equal to the embedding.",
            rich_help_panel=SIZES,
        ),
    ],
    "depth_method": _choice("identity (exact), stack, interpolate or solar. Default: identity."),
    "hidden_method": _choice("tile (copies), pad (any size) or auto. Default: auto."),
    "layer_placement": _choice(
        "auto, even, end, pattern (the class's order of layer kinds goes on), or indices such "
        "as 3,7,11. Default: auto (pattern where even would break it, else even)."
    ),
    "new_heads": _choice("copy, or zero: random heads with zero output. Default: copy."),
    "new_units": _choice("copy, or zero: random FFN units with zero output. Default: copy."),
    "symmetry": _choice("Shares of copies: split, even or noise. Default: split."),
    "noise_snr_db": Annotated[
        float | None,
        typer.Option(
            help="Signal-to-noise ratio of --symmetry noise, in dB.", rich_help_panel=CHOICES
        ),
    ],
    "seed": Annotated[
        int | None,
        typer.Option(help="Of every random number. Default: 0.", rich_help_panel=CHOICES),
    ],
    "optimizer_state": _choice(
        "Of the run that made the checkpoint: grow, reset, or reset-new (copies begin with zero "
        "moments). Default: grow, where it is found."
    ),
    "format": _choice("Family to write: the source's own, or gda for differential checkpoints."),
}


def growth_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the growth flags; it receives one argument ``request`` in their place."""
    # GrowthRequest is imported for type checkers alone, so its name cannot be evaluated here.
    command.__annotations__.pop("request")
    own = inspect.signature(command, eval_str=True)
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in FLAGS.items()
    ]
    recipe = inspect.Parameter(
        "recipe",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option(
                help="YAML file with a 'grow' section, or a name from 'growkit recipes'; flags win "
                "over it."
            ),
        ],
    )

    @wraps(command)
    def wrapper(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in FLAGS}
        command(request=_request(given, arguments.pop("recipe")), **arguments)

    kept = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.parameters.items()
        if name != "request"
    ]
    parameters = [kept[0], *flags, recipe, *kept[1:]]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _request(given: dict[str, Any], recipe: Path | None) -> GrowthRequest:
    from dataclasses import replace

    from growkit.recipe.shipped import find_recipe
    from growkit.surgery.request import GrowthRequest, read_recipe

    values = {name: value for name, value in given.items() if value is not None}
    if recipe is None:
        return GrowthRequest(**values)
    return replace(read_recipe(find_recipe(recipe)), **values)
