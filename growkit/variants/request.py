"""What the user asks of ``growkit convert``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from growkit.core.errors import UsageError, check_keys, nearest
from growkit.surgery.effect import Effect, ModelShape, Operator
from growkit.surgery.symmetry import Symmetry
from growkit.variants.catalogue import CONVERSIONS, converter_of

MERGES = ("mean", "first", "aligned")


@dataclass(frozen=True)
class ConversionRequest:
    """One conversion.

    Attributes:
        to: the attention to write, a key of ``CONVERSIONS``.
        ratio: signal heads a noise head.
        mirror: lambda of mirrored maps.
        kv_heads: key/value heads of ``gqa`` and ``wgqa``.
        merge: how several key/value heads become one: ``mean``, ``first`` or ``aligned``.
        rank, key_rank: of the updates of ``shared_diff``.
        wgqa_weights: ``scalar``, ``column`` or ``row``.
        simulated_heads: simulated heads a head of ``sas``.
        simulated_head_dim: their features; None: head_dim.
        kernel: of the head convolutions.
        format: class of transformers to fold into (``plain``).
        symmetry, seed: as in growth; the seed is of every random number.
    """

    to: str
    ratio: int | None = None
    mirror: float | None = None
    kv_heads: int | None = None
    merge: str = "mean"
    rank: int | None = None
    key_rank: int | None = None
    wgqa_weights: str = "scalar"
    simulated_heads: int = 2
    simulated_head_dim: int | None = None
    kernel: int = 1
    format: str | None = None
    symmetry: str = "split"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.merge not in MERGES:
            raise UsageError(
                f"--merge {self.merge!r} is not known.",
                f"{nearest(self.merge, MERGES)}Valid values: {', '.join(MERGES)}.",
            )
        if self.merge == "aligned" and self.to not in ("gqa", "mqa"):
            raise UsageError(
                f"--merge aligned does not go with --to {self.to}.", "Give --to gqa or --to mqa."
            )
        if self.to not in CONVERSIONS:
            raise UsageError(
                f"--to {self.to!r} is not known.",
                f"{nearest(self.to, CONVERSIONS)}Valid values: {', '.join(CONVERSIONS)}.",
            )

    def needed(self, field: str) -> int:
        """A number that this conversion cannot do without."""
        value: int | None = getattr(self, field)
        if value is None:
            option = f"--{field.replace('_', '-')}"
            raise UsageError(f"--to {self.to} needs {option}.", f"Give {option} N.")
        return value

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> ConversionRequest:
        """Read the request of a manifest or of Python. Raises UsageError for an unknown key."""
        known = [field.name for field in fields(ConversionRequest)]
        check_keys(values, known, "The request", " under 'convert'")
        if not isinstance(values.get("to"), str):
            raise UsageError("The request does not say 'to' which attention.", "Give 'to'.")
        return ConversionRequest(**values)

    def conversion(self) -> Operator:
        """The requested conversion, which depends on the family that it meets."""
        return _Requested(self)

    def symmetry_choice(self) -> Symmetry:
        """How copies share weights."""
        return Symmetry(self.symmetry, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        return {k: v for k, v in asdict(self).items() if v != defaults[k]}


@dataclass(frozen=True)
class _Requested:
    """The conversion of a request: that of the variant which is there for the source's family."""

    request: ConversionRequest

    def apply(self, shape: ModelShape) -> Effect:
        to, family = self.request.to, shape.family.name
        row = converter_of(family, to)
        assert row is not None  # the request was checked
        if to not in row.targets:
            raise UsageError(
                f"A {family} checkpoint cannot be converted to {to}.",
                f"Valid values of --to for this family: {', '.join(row.targets)}.",
            )
        return row.makers[to](self.request).apply(shape)
