"""What the user asks for, from flags or from a recipe file: the same request, the same plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from growkit.core.errors import UsageError, nearest
from growkit.surgery.amount import Amount
from growkit.surgery.effect import Operator
from growkit.surgery.operators import OPERATORS, TEXTS
from growkit.surgery.operators.depth import METHODS, PLACEMENTS
from growkit.surgery.operators.hidden import METHODS as HIDDEN_METHODS
from growkit.surgery.symmetry import MODES, Symmetry

CHOICES: dict[str, tuple[str | None, ...]] = {
    "depth_method": METHODS,
    "hidden_method": HIDDEN_METHODS,
    "new_heads": ("copy", "zero"),
    "new_units": ("copy", "zero"),
    "symmetry": MODES,
    "optimizer_state": (None, "grow", "reset", "reset-new"),
}
RECIPE_KEYS = ("grow", "description", "source", "purpose")


def option_of(key: str) -> str:
    """The flag of a recipe key."""
    return f"--{key.replace('_', '-')}"


@dataclass(frozen=True)
class GrowthRequest:
    """Sizes and choices of one growth. Sizes are ``x2``, ``+4`` or the new number.

    Attributes:
        signal_heads, noise_heads, uniform_heads: head groups of differential attention.
        heads: query and key/value heads of ordinary attention, counted in query heads.
        query_heads, kv_heads: one of the two; ``kv_heads`` counts pairs in differential attention.
        head_dim: channels of a head, where position encoding and norms allow it.
        ffn: ``intermediate_size``.
        hidden: ``hidden_size``, by ``hidden_method``.
        experts: experts; an FFN without is one.
        experts_per_token: how many of them a token is routed to.
        expert_reinit: part of each new expert's FFN units that is drawn anew (0 to 1); not exact.
        layers: depth, by ``depth_method`` at ``layer_placement``; of an encoder-decoder the
            encoder's.
        layers_from: in place of ``layers``: half-open slices of the source's layers, ``0-24,8-32``.
        decoder_layers: depth of an encoder-decoder's decoder, likewise.
        untie_embeddings: write an output projection of its own.
        depth_method: ``identity`` (exact), ``stack``, ``interpolate`` or ``solar``.
        hidden_method: ``tile`` (whole multiples), ``pad`` (any size) or ``auto`` (tile if it fits).
        layer_placement: ``auto``, ``even``, ``end``, ``pattern`` or indices such as ``3,7,11``.
        new_heads, new_units: ``copy``, or ``zero`` for random ones with zero output.
        symmetry: ``split``, ``even`` or ``noise``.
        noise_snr_db: decibels, for ``noise``.
        seed: of every random number.
        format: family to write, when not the source's.
        optimizer_state: of the run that made the source: ``grow`` it with the model (the default
            where it is found), ``reset`` it (write none), or ``reset-new``: copies begin with zero
            moments, old units go on.
    """

    signal_heads: str | None = None
    noise_heads: str | None = None
    uniform_heads: str | None = None
    heads: str | None = None
    query_heads: str | None = None
    kv_heads: str | None = None
    head_dim: str | None = None
    ffn: str | None = None
    hidden: str | None = None
    layers: str | None = None
    layers_from: str | None = None
    decoder_layers: str | None = None
    experts: str | None = None
    experts_per_token: int | None = None
    expert_reinit: float = 0.0
    untie_embeddings: bool = False
    depth_method: str = "identity"
    hidden_method: str = "auto"
    layer_placement: str = "auto"
    new_heads: str = "copy"
    new_units: str = "copy"
    symmetry: str = "split"
    noise_snr_db: float = 10.0
    seed: int = 0
    format: str | None = None
    optimizer_state: str | None = None

    def __post_init__(self) -> None:
        for field, choices in CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                words = [choice for choice in choices if choice is not None]
                raise UsageError(
                    f"--{field.replace('_', '-')} {value!r} is not known.",
                    f"{nearest(str(value), words)}Valid values: {', '.join(words)}.",
                )

        if not 0.0 <= self.expert_reinit <= 1.0:
            raise UsageError(
                f"--expert-reinit {self.expert_reinit} is no part of the units.",
                "Give a number from 0 to 1; 0.5 is usual (Drop-Upcycling).",
            )

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> GrowthRequest:
        """Read the ``grow`` section of a recipe. Raises UsageError for an unknown key."""
        known = {field.name: field for field in fields(GrowthRequest)}
        for key in values:
            if key not in known:
                raise UsageError(
                    f"The recipe has an unknown key {key!r} under 'grow'.",
                    f"{nearest(str(key), known)}Valid keys: {', '.join(known)}.",
                )
        converted: dict[str, Any] = {
            key: str(value) if str(known[key].type).startswith("str") else value
            for key, value in values.items()
            if value is not None  # as if it were not there
        }
        kinds = {"untie_embeddings": bool, "seed": int, "noise_snr_db": float}
        kinds |= {"expert_reinit": float}
        for key, kind in {**kinds, "experts_per_token": int}.items():
            value = converted.get(key)
            wrong = isinstance(value, bool) != (kind is bool)
            if value is not None and (wrong or not isinstance(value, (kind, int))):
                raise UsageError(
                    f"The recipe has {key}: {value!r} under 'grow'.",
                    f"It has to be a {kind.__name__}.",
                )
        return GrowthRequest(**converted)

    def operators(self) -> list[Operator]:
        """The requested operators, in the order in which they are applied."""
        for name, asked in (
            ("experts_per_token", self.experts_per_token is not None),
            ("expert_reinit", self.expert_reinit > 0.0),
        ):
            if asked and self.experts is None:
                raise UsageError(
                    f"{option_of(name)} has no effect without --experts.",
                    "Give --experts too, or leave it out.",
                )
        if self.layers_from and (self.layers or self.depth_method != "identity"):
            raise UsageError(
                "--layers-from names every layer of the grown model, so --layers and "
                "--depth-method have nothing to say.",
                "Give one or the other.",
            )
        result: list[Operator] = []
        for name, make in OPERATORS.items():
            if asked := getattr(self, name):
                amount = None
                if isinstance(asked, str):
                    amount = asked if name in TEXTS else Amount.parse(asked, option_of(name))
                result.append(make(amount, self))
        if not result:
            raise UsageError(
                "Nothing to grow was asked for.",
                f"Give at least one of {', '.join(map(option_of, OPERATORS))} or --recipe.",
            )
        return result

    def placement(self) -> str | tuple[int, ...]:
        """``layer_placement`` read: a word, or the indices of layers."""
        if self.layer_placement in PLACEMENTS:
            return self.layer_placement
        try:
            return tuple(int(part) for part in self.layer_placement.strip("[]").split(","))
        except ValueError:
            raise UsageError(
                f"--layer-placement {self.layer_placement!r} is not known.",
                f"Valid values: {', '.join(PLACEMENTS)}, or layer indices such as 3,7,11.",
            ) from None

    def symmetry_choice(self) -> Symmetry:
        """How copies share weights."""
        return Symmetry(self.symmetry, self.noise_snr_db, self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults; the ``grow`` section of a recipe."""
        defaults = GrowthRequest()
        return {k: v for k, v in asdict(self).items() if v != getattr(defaults, k)}


def read_recipe(path: Path) -> GrowthRequest:
    """The request of a recipe file with a ``grow`` section.

    Raises:
        UsageError: not a file, not YAML, no ``grow`` section, an unknown key.
    """
    from growkit.core.yaml_files import IncrementLoader, read_yaml

    content = read_yaml(path, IncrementLoader)
    if not isinstance(content, dict) or not isinstance(content.get("grow"), dict):
        raise UsageError(
            f"The recipe {str(path)!r} has no 'grow' section.",
            "Write for example: 'grow: {signal_heads: x2}'.",
        )
    for key in content:
        if key not in RECIPE_KEYS:
            raise UsageError(
                f"The recipe {str(path)!r} has an unknown key {key!r}.",
                f"{nearest(str(key), RECIPE_KEYS)}Valid keys: {', '.join(RECIPE_KEYS)}.",
            )
    return GrowthRequest.from_mapping(content["grow"])
