"""What a study will run, before it runs: sizes, steps and FLOPs of every base and arm. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from growkit.study.nodes import Nodes


@dataclass(frozen=True)
class Line:
    """One base or arm; steps, tokens and FLOPs are of its own run with one seed.

    Attributes:
        origin: what it starts from and what is done to that.
        rate: its learning rate, or how that is chosen.
    """

    name: str
    origin: str
    parameters: int
    flops_per_token: float
    steps: int
    tokens: int
    flops: float
    rate: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def outline(nodes: Nodes, arms: Sequence[str]) -> list[Line]:
    """The bases of some arms, and the arms."""
    study = nodes.study
    names: dict[str, None] = {}
    for arm in arms:
        chain: list[str] = []
        name: str | None = arm
        while name is not None:
            chain.append(name)
            name = study.start(name).base
        for one in reversed(chain):
            names.setdefault(one)
    return [_line(nodes, name) for name in names]


def _line(nodes: Nodes, name: str) -> Line:
    start, shape = nodes.study.start(name), nodes.shapes.of(name)
    steps = nodes.lengths.steps(name)
    origin = start.base or (str(start.checkpoint) if start.checkpoint else "scratch")
    if start.change is not None:
        ((_, values),) = start.change.items()
        origin += ", " + ", ".join(f"{key} {value}" for key, value in values.items())
    rate = nodes.rates(name)
    if isinstance(rate, dict):
        rate = f"that of {rate['of']}"
    elif isinstance(rate, list):
        rate = f"best of {len(rate)}"
    tokens = steps * nodes.lengths.tokens_per_step
    return Line(
        name=name,
        origin=origin,
        parameters=shape.parameters,
        flops_per_token=shape.flops_per_token,
        steps=steps,
        tokens=tokens,
        flops=tokens * shape.flops_per_token,
        rate=str(rate),
    )
