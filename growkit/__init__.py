"""growkit: make a trained transformer larger, verify that it computes the same, train it on.

``from growkit import grow, plan, convert, verify, GrowthRequest, load_grown_optimizer``; importing
growkit imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_API = ("Written", "convert", "grow", "load_grown_optimizer", "plan", "verify")

if TYPE_CHECKING:
    from growkit.api import Written, convert, grow, load_grown_optimizer, plan, verify
    from growkit.surgery.request import GrowthRequest

__all__ = [
    "GrowthRequest",
    "Written",
    "__version__",
    "convert",
    "grow",
    "load_grown_optimizer",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    """The Python interface, imported when it is first asked for."""
    from importlib import import_module

    if name in _API:
        return getattr(import_module("growkit.api"), name)
    if name == "GrowthRequest":
        return import_module("growkit.surgery.request").GrowthRequest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
