"""Learning-rate schedules against transformers' own, and WSD with restarts by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import make

from growkit.core.errors import UsageError
from growkit.training.growth.rates import Rates, slot_rates
from growkit.training.schedule import learning_rate_factor

STEPS = 20


def factors(text: Path, **changes: Any) -> list[float]:
    recipe = make(text, **{"max_steps": STEPS, "warmup_steps": 4, "decay_steps": 5, **changes})
    factor = learning_rate_factor(recipe)
    return [factor(step) for step in range(recipe.total_steps)]


def of_transformers(name: str, warmup: int, **options: Any) -> list[float]:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, warmup, STEPS, options)
    values = []
    for _ in range(STEPS):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("decay", ["linear", "cosine", "1-sqrt"])
def test_as_transformers(warmup: int, floor: float, decay: str, text_file: Path) -> None:
    common = {"warmup_steps": warmup, "min_learning_rate_ratio": floor, "decay_type": decay}
    pairs = [
        ("constant", "constant_with_warmup", {}),
        ("cosine", "cosine_with_min_lr", {"min_lr_rate": floor}),
        (
            "wsd",
            "warmup_stable_decay",
            {"num_decay_steps": 5, "decay_type": decay, "min_lr_ratio": floor},
        ),
        ("inverse_sqrt", "inverse_sqrt", {}),
    ]
    for ours, theirs, options in pairs:
        expected = of_transformers(theirs, warmup, **options)
        assert factors(text_file, schedule=ours, **common) == pytest.approx(expected), ours


def test_by_hand(text_file: Path) -> None:
    warmup = [0, 0.25, 0.5, 0.75]
    wsd = factors(text_file, schedule="wsd", decay_type="linear")
    assert wsd[:16] == [*warmup, *[1.0] * 12]
    assert wsd[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    cosine = factors(text_file, schedule="cosine", min_learning_rate_ratio=0.1)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 16)) / 2 for i in range(16)]
    assert cosine[4:] == pytest.approx(expected)
    fraction = factors(text_file, schedule="constant", warmup_steps=0.2)
    assert fraction == factors(text_file, schedule="constant")


def test_wsd_restarts(text_file: Path) -> None:
    """Every cycle decays to its end and rises again; the last one is the plain schedule's."""
    values = factors(
        text_file,
        schedule="wsd",
        warmup_steps=2,
        decay_steps=2,
        decay_type="linear",
        restarts=[8, 14],
        restart_warmup_steps=2,
    )
    first = [0, 0.5, 1, 1, 1, 1, 1, 0.5]
    later = [0, 0.5, 1, 1, 1, 0.5]
    assert values == pytest.approx([*first, *later, *later])
    assert values != factors(text_file, schedule="wsd", warmup_steps=2, decay_steps=2)
    at_once = factors(text_file, schedule="wsd", decay_steps=2, restarts=[10])
    assert at_once[10] == 1.0 and at_once[9] < 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"restarts": [8, 8]}, r"restarts is \[8, 8\]"),
        ({"restarts": [20]}, r"of 20 steps in all"),
        ({"restarts": [8], "restart_warmup_steps": 9}, r"restart_warmup_steps \(9\).*from 8 to 20"),
        ({"restarts": [8], "schedule": "cosine"}, "belongs to schedule wsd"),
        ({"train": {"new_then_all": 20}}, r"new_then_all is 20, and the run has 20"),
        ({"train": {"new_then_all": 0}}, r"training.train'.*say new, all, or"),
        ({"train": {"new": 3}}, "say new, all, or"),
        ({"train": "old"}, r"It is 'old'; say new, all, or"),
        ({"train": "new", "old_learning_rate_multiplier": 0.5}, "no effect"),
        ({"old_warmup_steps": 5}, "follows the thaw"),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], message: str, text_file: Path) -> None:
    with pytest.raises(UsageError, match=message):
        make(text_file, **{"max_steps": STEPS, "schedule": "wsd", "decay_steps": 4, **changes})


def test_slot_rates(text_file: Path) -> None:
    def at(**changes: Any) -> list[Rates]:
        rates = slot_rates(make(text_file, max_steps=STEPS, **changes))
        return [rates(step) for step in range(8)]

    assert at() == [Rates(1.0, 1.0)] * 8
    assert at(train="new", new_learning_rate_multiplier=3) == [Rates(0.0, 3.0)] * 8
    thawed = at(train={"new_then_all": 3}, old_learning_rate_multiplier=0.5)
    assert thawed == [Rates(0.0, 1.0)] * 3 + [Rates(0.5, 1.0)] * 5
    slow = at(train={"new_then_all": 0.15}, old_warmup_steps=3)
    assert [rate.old for rate in slow] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    warm = at(new_warmup_steps=3, new_learning_rate_multiplier=2)
    assert [rate.new for rate in warm] == [0.5, 1, 1.5, 2, 2, 2, 2, 2]
    assert {rate.old for rate in warm} == {1.0}
