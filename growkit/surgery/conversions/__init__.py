"""Conversions between attention variants, one a file. Each turns a request into data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from growkit.surgery.conversions.conversion import Conversion
from growkit.surgery.conversions.gda import ToGda

if TYPE_CHECKING:
    from growkit.surgery.conversion_request import ConversionRequest

# Value of --to -> how the conversion is made of the request. One line a conversion.
CONVERSIONS: dict[str, Callable[[ConversionRequest], Conversion]] = {
    "gda": lambda request: ToGda(request.ratio, request.mirror),
}

__all__ = ["CONVERSIONS", "Conversion", "ToGda"]
