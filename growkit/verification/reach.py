"""How far a model looks: the longest length at which its config makes it compute something else.

Sliding windows, attention chunks and the lengths at which a rotary scaling sets in are invisible in
text that is shorter than they are: a window that growth lost shows only behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Config fields, at any depth, that hold a length from which on a layer attends otherwise.
LENGTH_FIELDS = (
    "sliding_window",
    "attention_chunk_size",
    "attention_window",
    "attention_window_size",
    "window_size",
    "local_attention",
    "chunk_size",
    "local_size",
    "relative_attention_max_distance",
)
# Kinds of layers that read such a length; a config that lists other kinds alone reads none.
LOCAL_LAYERS = ("sliding", "chunked", "local")
UNSCALED = ("default", "linear", "proportional")  # the same at every length


@dataclass(frozen=True)
class Boundary:
    """A length (in tokens) from which on a model computes otherwise, and the field that says so."""

    length: int
    field: str


def longest_boundary(*configs: Mapping[str, Any]) -> Boundary | None:
    """The longest boundary of configs as nested dicts; None when all look everywhere alike."""
    found = [boundary for config in configs for boundary in boundaries(config)]
    return max(found, key=lambda boundary: boundary.length, default=None)


def boundaries(config: Mapping[str, Any]) -> Iterator[Boundary]:
    """All boundaries of a config, nested ones included."""
    yield from _lengths(config, "")
    yield from _scalings(config, config, "")


def is_dynamic(config: Mapping[str, Any]) -> bool:
    """The rotary frequencies depend on the length of the text (dynamic NTK): keys in a cache keep
    the frequencies of an earlier length, by design."""
    parts = (value for value in config.values() if isinstance(value, Mapping))
    return _rope_type(config) == "dynamic" or any(map(is_dynamic, parts))


def _rope_type(part: Mapping[str, Any]) -> str:
    return str(part.get("rope_type") or part.get("type") or "")


def _lengths(part: Mapping[str, Any], path: str) -> Iterator[Boundary]:
    types = part.get("layer_types")
    local = not isinstance(types, list | tuple) or any(
        str(kind).startswith(LOCAL_LAYERS) for kind in types
    )
    for name, value in part.items():
        if isinstance(value, Mapping):
            yield from _lengths(value, f"{path}{name}.")
        elif name in LENGTH_FIELDS and (local or name == "relative_attention_max_distance"):
            values = value if isinstance(value, list | tuple) else [value]
            numbers = [n for n in values if type(n) is int and n > 0]
            if numbers:
                yield Boundary(max(numbers), path + name)


def _scalings(part: Mapping[str, Any], parent: Mapping[str, Any], path: str) -> Iterator[Boundary]:
    """Rotary scalings: ``parent`` is the config that a scaling's own dict lies in."""
    kind = _rope_type(part) if "rope" in path else ""
    if kind and kind not in UNSCALED:
        for holder, prefix in ((part, path), (parent, "")):
            length = holder.get("original_max_position_embeddings")
            if type(length) is int and length > 0:
                yield Boundary(length, f"{prefix}original_max_position_embeddings")
                break
        else:
            length = parent.get("max_position_embeddings")
            if type(length) is int and length > 0:
                yield Boundary(length, "max_position_embeddings")
    holder = part if "max_position_embeddings" in part else parent
    for name, value in part.items():
        if isinstance(value, Mapping):
            yield from _scalings(value, holder, f"{path}{name}.")
