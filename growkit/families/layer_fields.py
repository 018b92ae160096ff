"""What a config says of single layers, and how it moves when layers do; values at paths."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Path = tuple[str, ...]
# A dict keyed by numbers that are no layers.
LABELS = "id2label"


def leaf(config: Mapping[str, Any], path: Path) -> Any:
    """The value at ``path``; None where it is absent."""
    value: Any = config
    for part in path:
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def with_values(config: Mapping[str, Any], changes: Mapping[Path, Any]) -> dict[str, Any]:
    """A copy of ``config`` with other values at some paths."""
    result = copy.deepcopy(dict(config))
    for path, value in changes.items():
        inner = result
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = value
    return result


def is_index_list(value: Any, layers: int) -> bool:
    """A list of some layers' indices, in order."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < layers for v in value)
        and all(a < b for a, b in itertools.pairwise(value))
        and (len(value) != layers or layers > 2)
    )


def move_entry(value: Any, layers: int, sources: Sequence[int]) -> Any:
    """A value of the config, where it speaks of single layers, after they have moved; else None.

    A list with one entry a layer, a list of layers' indices, or a dict keyed by them.

    Args:
        value: of a config with ``layers`` layers.
        sources: old layer of each new one.
    """
    if is_index_list(value, layers):
        return [new for new, source in enumerate(sources) if source in value]
    if isinstance(value, list) and len(value) == layers:
        return [value[source] for source in sources]
    if isinstance(value, Mapping) and value and all(str(key).isdigit() for key in value):
        by_layer = {int(key): entry for key, entry in value.items()}
        width = min(len(str(key)) for key in value)
        padded = all(len(str(key)) == width for key in value) and width > 1
        return {
            str(new).zfill(width if padded else 1): by_layer[source]
            for new, source in enumerate(sources)
            if source in by_layer
        }
    return None


def move_counts(
    config: Mapping[str, Any], rules: Mapping[str, str], layers: int, sources: Sequence[int]
) -> dict[str, Any]:
    """Fields that count layers of one kind, or are divided by a root of their number, moved along.

    Args:
        config: of a model with ``layers`` layers.
        rules: field -> ``leading`` (it counts the first layers), ``trailing`` (the last ones) or
            ``root`` (the class divides it by the square root of the number of layers).
        sources: old layer of each new one.
    """
    moved: dict[str, Any] = {}
    for name, rule in rules.items():
        value = config.get(name)
        if rule == "root" and isinstance(value, int | float):
            moved[name] = value * (len(sources) / layers) ** 0.5
        elif isinstance(value, int):
            leading = rule == "leading"
            edge = value if leading else layers - value
            moved[name] = sum((source < edge) == leading for source in sources)
    return moved


def move_sections(
    config: Mapping[str, Any], fields: Sequence[str], sources: Sequence[int]
) -> dict[str, int]:
    """Numbers of the layers of sections one behind another, after layers have moved."""
    start, moved = 0, {}
    for name in fields:
        end = start + config[name]
        moved[name] = sum(start <= source < end for source in sources)
        start = end
    return moved


# -- widths that are a factor times another size ---------------------------------------------------


def factor_name(factor: str, of: str, multiple: str = "") -> str:
    """The name of a width that the class makes of a factor and of another size, rounded up to a
    multiple if a field says of what: it stands for the width where no field does."""
    return f"{factor}*{of}" + (f"%{multiple}" if multiple else "")


def factor_fields(name: str) -> tuple[str, str, str] | None:
    """Factor, size and multiple of such a name; None of a plain field."""
    factor, times, rest = name.partition("*")
    of, _, multiple = rest.partition("%")
    return (factor, of, multiple) if times else None


def made_of_factor(factor: float, of: int, multiple: int = 1) -> int:
    """The width that a class makes: rounded down, or up to a multiple."""
    return int((factor * of + multiple - 1) // multiple * multiple)


def factor_stated(name: str, width: int, of: int) -> dict[str, Any]:
    """What a config says for a width: half a unit more, which rounding takes away."""
    fields = factor_fields(name)
    assert fields is not None
    factor, _, multiple = fields
    return {factor: (width + 0.5) / of} | ({multiple: 1} if multiple else {})
