"""What from scratch needs for a loss: exact between its budgets, a bound beyond them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up_studies import BUDGET, made_arm, made_phase, made_study

from growkit.study.caveats import limits
from growkit.study.page import markdown, study_page
from growkit.study.results import Arm, Run, StudyResult, result_from
from growkit.study.scratch_curve import scratch_savings

SEEDS = {1: 0.0, 2: 0.1, 3: -0.05}
# Of a decade of FLOPs, in nats.
SLOPE = 0.5


def ended(name: str, part: float, losses: dict[int, float], **changes: object) -> Arm:
    """An arm that spent a part of the budget and ended in these losses."""
    runs = tuple(
        Run(seed, (made_phase(f"{name}{seed}", part * BUDGET, 7.0, loss),), ())
        for seed, loss in losses.items()
    )
    budget = None if part == 1.0 else part * BUDGET
    return replace(made_arm(name, {}, **changes), runs=runs, budget=budget)


def scratch(name: str, part: float) -> Arm:
    """0.5 nats a decade below 3.5 at the whole budget, and each seed by its own."""
    import math

    return ended(name, part, {s: 3.5 + off - SLOPE * math.log10(part) for s, off in SEEDS.items()})


def study(*lower: float, part: float = 1.0) -> StudyResult:
    """From scratch at one and four budgets; grown arms so many nats below the first of them."""
    grown = [
        ended(f"grown-{n}", part, {s: 3.5 + off - less for s, off in SEEDS.items()}, source=0.2)
        for n, less in enumerate(lower)
    ]
    return made_study(scratch("one", 1.0), scratch("four", 4.0), *grown)


@pytest.mark.parametrize("less", [0.02, 0.15, 0.29])
def test_exact_between_the_budgets(less: float) -> None:
    (found,) = scratch_savings(study(less))
    assert found.bound == "" and set(found.needed) == set(SEEDS)
    for needed in found.needed.values():
        assert needed == pytest.approx(BUDGET * 10 ** (less / SLOPE))
    assert found.saved is not None and found.saved.mean == pytest.approx(1 - 10 ** (-less / SLOPE))
    assert "saves" in found.sentence() and "3 seeds" in found.sentence()


def test_a_smaller_budget_counts() -> None:
    """As good as from scratch with half its FLOPs: half is saved."""
    (found,) = scratch_savings(study(0.0, part=0.5))
    assert found.saved is not None and found.saved.mean == pytest.approx(0.5)


def test_control_seeds_are_paired() -> None:
    """Each seed against the curve of another one gives another saving for each."""
    result = study(0.15)
    *others, grown = result.arms
    turned = dict(zip((2, 3, 1), grown.runs, strict=True))
    runs = tuple(replace(run, seed=seed) for seed, run in turned.items())
    (found,) = scratch_savings(replace(result, arms=(*others, replace(grown, runs=runs))))
    (paired,) = scratch_savings(result)
    assert paired.saved is not None and paired.saved.standard_error == pytest.approx(0, abs=1e-9)
    assert found.saved is None or found.saved.standard_error > 0.01  # type: ignore[operator]


def test_beyond_the_budgets_it_is_a_bound() -> None:
    (below,) = scratch_savings(study(0.9))
    assert below.bound == "at least" and below.saved is not None
    assert below.saved.mean == pytest.approx(0.75) and "at least 75.0 %" in below.sentence()
    assert "CI" not in below.sentence() and below.corrected is None
    (above,) = scratch_savings(study(-0.2))
    assert above.bound == "at most" and above.saved is not None
    assert above.saved.mean == pytest.approx(0.0)
    both = study(0.0)
    *others, grown = both.arms
    first, second, third = grown.runs
    far = replace(second, phases=(replace(second.phases[0], last_loss=0.1),))
    high = replace(third, phases=(replace(third.phases[0], last_loss=9.0),))
    mixed = replace(both, arms=(*others, replace(grown, runs=(first, far, high))))
    (found,) = scratch_savings(mixed)
    assert found.saved is None and "both sides" in found.sentence()


def test_one_budget_has_no_curve() -> None:
    result = made_study(scratch("one", 1.0), ended("grown", 1.0, {1: 3.0}, source=0.2))
    assert scratch_savings(result) == [] and "saves" not in markdown(result)


def test_the_correction_widens_the_interval() -> None:
    result = study(0.1, 0.15)
    *others, last = result.arms
    moved = [
        replace(run, phases=(replace(run.phases[0], last_loss=run.final_loss + 0.01 * run.seed),))
        for run in last.runs
    ]
    found = scratch_savings(replace(result, arms=(*others, replace(last, runs=tuple(moved)))))[1]
    assert found.compared == 2 and found.corrected is not None and found.saved is not None
    low, high = found.saved.low, found.saved.high
    assert low is not None and high is not None
    assert found.corrected[0] < low < high < found.corrected[1]
    # t of 97.5 % with two degrees of freedom is 6.205, of 95 % 4.303.
    assert (found.corrected[1] - found.corrected[0]) / (high - low) == pytest.approx(
        6.2053 / 4.3027, rel=1e-3
    )


def test_table_page_and_file_have_it() -> None:
    result = study(0.15)
    text = markdown(result)
    assert "Training FLOPs saved against from scratch" in text and "saves 49.9 %" in text
    assert "Equal FLOPs" not in text and "FLOPs to target" not in text
    assert "saves 49.9 %" in study_page(result, [])
    assert not [line for line in limits(result) if "of the budget (seed" in line]
    again = result_from(result.to_dict())
    assert [arm.budget for arm in again.arms] == [None, 4 * BUDGET, None]
    assert "budget" not in result.to_dict()["arms"][0]


def test_the_figure_is_drawn() -> None:
    from growkit.study.figures import draw_figures

    figures = {figure.key: figure for figure in draw_figures(study(0.15), png=False)}
    assert "<svg" in figures["budgets"].svg
    one = made_study(scratch("one", 1.0), ended("grown", 1.0, {1: 3.0}, source=0.2))
    assert "budgets" not in {figure.key for figure in draw_figures(one, png=False)}
