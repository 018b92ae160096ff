"""What a checkpoint can be grown by, and the refusal that says so."""

from __future__ import annotations

from growkit.core.errors import UsageError
from growkit.surgery.effect import ModelShape
from growkit.surgery.operators import OPERATORS, OperatorRow


def growable(shape: ModelShape) -> list[str]:
    """The flags that this checkpoint can be grown by."""
    return [row.flag for row in OPERATORS.values() if _grows(row, shape)]


def _grows(row: OperatorRow, shape: ModelShape) -> bool:
    if row.flag in shape.family.refused:
        return False
    own = getattr(row.module, "grows", None)
    return bool(own(row, shape)) if own else row.axis in shape.sizes


def shares_heads(shape: ModelShape) -> bool:
    """The family can hold more query than key/value heads."""
    if "query_head" not in shape.sizes:
        return True
    sizes = {**shape.sizes, "query_head": 2 * shape.sizes["query_head"]}
    wider = {**sizes, "hidden": 2 * sizes["hidden"]}
    return any(shape.family.refusal(shape.config, tried) is None for tried in (sizes, wider))


def require_axis(shape: ModelShape, axis: str, option: str) -> None:
    """Raise UsageError when the family has no such axis, or refuses the operator by name."""
    if reason := shape.family.refused.get(option):
        cause = f"{option} cannot grow a {shape.family.name} checkpoint: {reason}."
    elif axis not in shape.sizes:
        cause = (
            f"A {shape.family.name} checkpoint has no {axis.replace('_', ' ')}s, so {option} "
            "cannot grow it."
        )
    else:
        return
    raise UsageError(cause, f"It can be grown by: {', '.join(growable(shape))}.")
