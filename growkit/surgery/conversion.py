"""Names of :mod:`growkit.surgery.effect` that conversions used before."""

from growkit.surgery.effect import (
    Alias,
    Array,
    Computed,
    UnitMaps,
    constant_rows,
    filled,
)
from growkit.surgery.effect import Effect as Converted
from growkit.surgery.effect import Operator as Conversion

__all__ = [
    "Alias",
    "Array",
    "Computed",
    "Conversion",
    "Converted",
    "UnitMaps",
    "constant_rows",
    "filled",
]
