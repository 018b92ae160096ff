"""What the user asks for, from flags or from a recipe file: the same request, the same plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

from growkit.core.errors import UsageError, check_keys, nearest
from growkit.surgery.amount import Amount
from growkit.surgery.effect import Operator, WarmStart
from growkit.surgery.operators import OPERATORS, OperatorRow, Option, all_options, rows_as_applied
from growkit.surgery.symmetry import Symmetry

RECIPE_KEYS = ("grow", "description", "source", "purpose")
Size = str | int | None


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
        expert_layers: layers whose FFN becomes experts: indices and half-open ranges, ``1,3,8-16``.
        expert_reinit: part of each new expert's FFN units that is drawn anew (0 to 1); not exact.
        layers: depth, by ``depth_method`` at ``layer_placement``; of an encoder-decoder the
            encoder's.
        layers_from: in place of ``layers``: half-open slices of the source's layers, ``0-24,8-32``.
        decoder_layers: depth of an encoder-decoder's decoder, likewise.
        tokenizer: folder of another tokenizer, whose vocabulary the model gets.
        add_tokens: file of tokens to add to it, or to the model's own.
        vocab: rows of the vocabulary, beyond the tokenizer's.
        vocab_init: rows of new tokens: ``subwords``, ``mean``, ``noise-mean`` or ``zero``.
        new_token_bias: the part of the probability that all new tokens together have at most; the
            bias of the head says so.
        pad_vocab_to: the rows are rounded up to a whole multiple of it.
        untie_embeddings: write an output projection of its own.
        new_layers: what new layers begin as: ``identity`` (exact), ``random``, ``copy`` (0 1 0 1),
            ``interposed`` (0 0 1 1) or ``aligned`` (mean of two matched neighbours); they begin
            without optimizer state.
        depth_method: the older name: ``identity`` (exact), ``stack``, ``interpolate`` or ``solar``.
        hidden_method: ``tile`` (whole multiples), ``pad`` (any size) or ``auto`` (tile if it fits).
        layer_placement: ``auto``, ``even``, ``end``, ``pattern`` or indices such as ``3,7,11``.
        new_heads, new_units: ``copy``, or ``zero`` for random ones with zero output.
        symmetry: ``split``, ``even``, ``noise`` or ``rms``.
        noise_snr_db: decibels, for ``noise``.
        warm_start: ``shrink-pad-perturb``: every matrix becomes ``shrink`` times the old one, zeros
            where it grows, plus ``perturb`` times the start of a model from scratch; not exact.
        shrink, perturb: its factors.
        seed: of every random number.
        part: of a multimodal model: ``text``, or a tower by the name of its config (``vision``).
        drop_tensors: regular expression of stored tensors that the class does not read, which are
            left out.
        format: family to write, when not the source's.
        optimizer_state: of the run that made the source: ``grow`` it with the model (the default
            where it is found), ``reset`` it (write none), or ``reset-new``: copies begin with zero
            moments, old units continue (the default with ``rms``).
    """

    signal_heads: Size = None
    noise_heads: Size = None
    uniform_heads: Size = None
    heads: Size = None
    query_heads: Size = None
    kv_heads: Size = None
    head_dim: Size = None
    ffn: Size = None
    hidden: Size = None
    layers: Size = None
    layers_from: str | None = None
    decoder_layers: Size = None
    experts: Size = None
    experts_per_token: int | None = None
    expert_layers: str | None = None
    expert_width: int | None = None
    shared_expert_width: int | None = None
    expert_reinit: float = 0.0
    tokenizer: str | None = None
    add_tokens: str | None = None
    vocab: Size = None
    vocab_init: str = "subwords"
    new_token_bias: float | None = None
    pad_vocab_to: int | None = None
    untie_embeddings: bool = False
    new_layers: str | None = None
    depth_method: str = "identity"
    hidden_method: str = "auto"
    layer_placement: str = "auto"
    new_heads: str = "copy"
    new_units: str = "copy"
    symmetry: str = "split"
    noise_snr_db: float = 10.0
    warm_start: str | None = None
    shrink: float = 0.4
    perturb: float = 1.0
    seed: int = 0
    part: str | None = None
    drop_tensors: str | None = None
    format: str | None = None
    optimizer_state: str | None = None

    def __post_init__(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for option in all_options():
            value = getattr(self, option.key, None)
            if value != defaults.get(option.key):
                _check(option, value)

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> GrowthRequest:
        """Read the ``grow`` section of a recipe. Raises UsageError for an unknown key."""
        made = _request_type()
        known = {option.key: option for option in all_options()}
        names = [field.name for field in fields(made)]
        check_keys(values, names, "The recipe", " under 'grow'")
        return made(
            **{
                key: _read(known[key], value)
                for key, value in values.items()
                if value is not None  # as if it were not there
            }
        )

    def operators(self) -> list[Operator]:
        """The requested operators, in the order in which they are applied."""
        defaults = type(self)()
        for option in all_options():
            asked = getattr(self, option.key, None) != getattr(defaults, option.key, None)
            if option.needs and asked and getattr(self, option.needs, None) is None:
                needed = f"--{option.needs.replace('_', '-')}"
                raise UsageError(
                    f"{option.flag} has no effect without {needed}.",
                    f"Give {needed} too, or leave it out.",
                )
        result: list[Operator] = []
        for row in self._rows():
            asked = getattr(self, row.key)
            value = Amount.parse(asked, row.flag) if row.is_amount else asked
            if (operator := row.module.make(row, value, self)) is not None:
                result.append(operator)
        if not result:
            flags = ", ".join(row.flag for row in OPERATORS.values())
            raise UsageError(
                "Nothing to grow was asked for.", f"Give at least one of {flags} or --recipe."
            )
        return result

    def flags(self) -> list[str]:
        """Flags of the requested growths."""
        return [row.flag for row in self._rows()]

    def _rows(self) -> list[OperatorRow]:
        """Rows of the requested growths, in the order in which they are applied."""

        def asked(value: Any) -> bool:
            return not (value is None or value is False or value == "")  # 0 is asked for

        return [row for row in rows_as_applied() if asked(getattr(self, row.key, None))]

    def symmetry_choice(self) -> Symmetry:
        """How copies share weights."""
        return Symmetry(self.symmetry, self.noise_snr_db, self.seed)

    def warm_start_choice(self) -> WarmStart | None:
        """The factors of a warm start; None: the growth keeps what it can."""
        return WarmStart(self.shrink, self.perturb) if self.warm_start else None

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults; the ``grow`` section of a recipe."""
        defaults = type(self)()
        sizes = {row.key for row in OPERATORS.values() if row.is_amount}
        return {
            key: str(value) if key in sizes else value
            for key, value in asdict(self).items()
            if value != getattr(defaults, key)
        }

    def recorded(self) -> dict[str, Any]:
        """:meth:`to_dict` without local paths: what they named lies in the folder that is written,
        so its name will do."""
        paths = {option.key for option in all_options() if option.kind is Path}
        return {k: Path(v).name if k in paths else v for k, v in self.to_dict().items()}


def _request_type() -> type[GrowthRequest]:
    """GrowthRequest, with a field for each option that it does not name (a growth of others)."""
    named = {field.name for field in fields(GrowthRequest)}
    further = [
        (option.key, option.kind, field(default=False if option.kind is bool else None))
        for option in all_options()
        if option.key not in named
    ]
    if not further:
        return GrowthRequest
    return make_dataclass("GrowthRequest", further, bases=(GrowthRequest,), frozen=True)


def _check(option: Option, value: Any) -> None:
    if option.values and value not in option.values:
        raise UsageError(
            f"{option.flag} {value!r} is not known.",
            f"{nearest(str(value), option.values)}Valid values: {', '.join(option.values)}.",
        )
    if option.check is not None:
        option.check(value)


def _read(option: Option, value: Any) -> Any:
    """A value as YAML or Python gives it. Raises UsageError when it is of another kind."""
    if option.kind in (str, Path):
        return str(value)
    wrong = isinstance(value, bool) != (option.kind is bool)
    if wrong or not isinstance(value, (option.kind, int)):
        raise UsageError(
            f"The recipe has {option.key}: {value!r} under 'grow'.",
            f"It has to be a {option.kind.__name__}.",
        )
    return value


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
    check_keys(content, RECIPE_KEYS, f"The recipe {str(path)!r}")
    return GrowthRequest.from_mapping(content["grow"])
