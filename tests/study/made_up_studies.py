"""Made-up studies: curves with known crossings, so that every answer is known beforehand."""

from __future__ import annotations

import math
from typing import Any

from growkit.study.results import Arm, Comparison, Phase, Point, Run, StudyResult, Sweep

BUDGET = 1e15


def loss_at(flops: float, final: float) -> float:
    """Linear in log FLOPs: 0.5 nats less for every tenfold, ``final`` at the end of the budget."""
    return final + 0.5 * math.log10(BUDGET / flops)


def made_phase(key: str, flops: float, first: float, last: float, **changes: Any) -> Phase:
    return Phase(
        **{
            "key": key,
            "change": None,
            "exactness": None,
            "parameters": 1_000_000,
            "flops_per_token": 6e6,
            "steps": 1000,
            "tokens": int(flops / 6e6),
            "flops": flops,
            "learning_rate": 3e-3,
            "seconds": 600.0,
            "first_loss": first,
            "last_loss": last,
            **changes,
        }
    )


def made_run(
    seed: int, final: float, *, key: str = "", source: float = 0.0, points: int = 60
) -> Run:
    """A run on :func:`loss_at`; ``source`` is the part of the budget that its source spent."""
    starts = [10 ** (15 - 3 * i / points) for i in range(points, -1, -1)]
    flops = sorted({*starts, source * BUDGET} - {0.0})
    curve = tuple(Point(f, int(f / 6e6), loss_at(f, final)) for f in flops)
    begin = loss_at(source * BUDGET, final) if source else 7.0
    phases = [made_phase(f"{key}{seed}", BUDGET * (1 - source), begin, final)]
    if source:
        phases.insert(0, made_phase(f"source{seed}", BUDGET * source, 7.0, begin))
        phases[1] = made_phase(
            f"{key}{seed}", BUDGET * (1 - source), begin, final,
            change="signal_heads x2", exactness="exact", learning_rate=1e-3,
        )  # fmt: skip
    series = {"head_similarity": [(1e6 * i, 1 - 0.1 * i) for i in range(4)]} if source else {}
    return Run(seed, tuple(phases), curve, {"bits_per_byte": final / 2}, series)


def made_arm(name: str, finals: dict[int, float], **changes: Any) -> Arm:
    source = changes.pop("source", 0.0)
    runs = tuple(made_run(s, final, key=name, source=source) for s, final in finals.items())
    fields: dict[str, Any] = {
        "label": name,
        "from_scratch": not source,
        "shape": "large",
        "parameters": 1_000_000,
        "flops_per_token": 6e6,
        "runs": runs,
    }
    return Arm(name=name, **(fields | changes))


def made_study(*arms: Arm, comparisons: tuple[Comparison, ...] | None = None, **changes: Any):
    """All arms against the first, unless said otherwise."""
    first = arms[0].name
    asked = tuple(Comparison(arm.name, first) for arm in arms[1:])
    fields: dict[str, Any] = {
        "name": "made-up",
        "question": "Does it pay?",
        "budget": BUDGET,
        "sequence_length": 128,
        "held_out_tokens": 65_536,
        "machine": {"processor": "two cores", "torch": "2.13"},
        "date": "2026-11-22T10:00:00+00:00",
        "seeds": (1, 2, 3),
        "target": None,
        "recipe": {"name": "made-up", "arms": [arm.name for arm in arms]},
    }
    return StudyResult(
        arms=arms, comparisons=asked if comparisons is None else comparisons, **(fields | changes)
    )


def growth_study() -> StudyResult:
    """From scratch against a growth that ends 0.03 lower, and one that differs by noise."""
    scratch = {1: 3.50, 2: 3.60, 3: 3.45}
    return made_study(
        made_arm("scratch", scratch, sweep=sweep()),
        made_arm("signal", {1: 3.471, 2: 3.569, 3: 3.420}, source=0.2, sweep=sweep(1e-2)),
        made_arm("noise", {1: 3.49, 2: 3.612, 3: 3.449}, source=0.2),
    )


def sweep(chosen: float = 3e-3) -> Sweep:
    losses = ((1e-3, 4.0), (3e-3, 3.9), (1e-2, math.nan))
    return Sweep(losses=losses, chosen=chosen, share=0.25, seed=1)
