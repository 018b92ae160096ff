"""Verdicts: what is shown, what is not, and that the pairing is what shows it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from made_up_studies import growth_study, made_arm, made_study

from growkit.study.results import Arm, Comparison, StudyResult
from growkit.study.statistics import Finding, findings

SCRATCH = {1: 3.50, 2: 3.60, 3: 3.45}


def only(*finals: dict[int, float]) -> Finding:
    arms = [made_arm(name, losses) for name, losses in zip("AB", finals, strict=True)]
    (found,) = findings(made_study(*arms, comparisons=(Comparison("A", "B"),)))
    return found


def test_a_difference_is_shown() -> None:
    found = only({1: 3.49, 2: 3.588, 3: 3.436}, SCRATCH)
    # Differences -0.010, -0.012, -0.014: mean 0.012, standard error 0.002 / sqrt(3), t = 4.303.
    assert found.verdict == "A lower by 0.0120 (95 % CI 0.0070 to 0.0170, 3 seeds)"
    assert found.direction == found.word == "lower"
    other = only(SCRATCH, {1: 3.49, 2: 3.588, 3: 3.436})
    assert other.verdict == "A higher by 0.0120 (95 % CI 0.0070 to 0.0170, 3 seeds)"


def test_no_difference_is_said_to_be_none() -> None:
    found = only({1: 3.49, 2: 3.612, 3: 3.449}, SCRATCH)
    assert found.verdict == "no difference shown (+0.000, 95 % CI -0.027 to +0.028, 3 seeds)"
    assert found.word == "no difference shown"
    assert only(SCRATCH, SCRATCH).word == "no difference shown"


def test_seeds_are_pairs() -> None:
    """The same losses with the seeds of one arm permuted: the difference is lost in the spread."""
    lower = {seed: loss - 0.03 + 0.001 * seed for seed, loss in SCRATCH.items()}
    assert only(lower, SCRATCH).direction == "lower"
    turned = dict(zip((2, 3, 1), lower.values(), strict=True))
    assert sorted(turned.values()) == sorted(lower.values())
    assert only(turned, SCRATCH).direction == "none"


def test_seeds_that_only_one_arm_has_are_left_out() -> None:
    found = only({1: 3.4, 2: 3.5, 9: 0.0}, SCRATCH)
    assert sorted(found.differences) == [1, 2] and found.estimate is not None
    assert found.estimate.mean == pytest.approx(-0.1)


def test_one_seed_says_nothing() -> None:
    found = only({1: 3.4}, SCRATCH)
    assert found.verdict == "one seed: no statement (difference -0.1000)"
    assert found.direction == "unknown" and found.adjusted_p is None
    assert only({9: 3.4}, SCRATCH).verdict == "no seed finished by both: no statement"
    assert only({}, SCRATCH).word == "no statement"


def test_two_seeds_have_a_huge_interval() -> None:
    found = only({1: 3.49, 2: 3.58}, SCRATCH)  # -0.01 and -0.02: 12.7 x 0.005 around -0.015
    assert found.verdict == "no difference shown (-0.015, 95 % CI -0.079 to +0.049, 2 seeds)"


def test_diverged_runs_are_no_numbers() -> None:
    found = only({1: 3.49, 2: math.nan, 3: 3.44}, SCRATCH)
    assert found.left_out == (2,) and sorted(found.differences) == [1, 3]
    assert found.verdict.endswith("(left out, loss not finite: seed 2)")


def test_an_end_near_zero_is_not_shown_as_zero() -> None:
    found = only({1: 3.4715, 2: 3.5762, 3: 3.4395}, SCRATCH)
    assert found.estimate is not None and found.estimate.high is not None
    assert "+0.000," not in found.verdict and "0.000 to" not in found.verdict


def test_many_comparisons_are_corrected_together() -> None:
    """Twenty arms of pure noise and one real difference of p = 0.03 that does not survive them."""
    draw = random.Random(4).gauss
    losses = {seed: 3.5 + draw(0, 0.05) for seed in (1, 2, 3)}
    arms = [made_arm("reference", losses)]
    arms.append(made_arm("real", {s: v - (0.01, 0.014, 0.019)[s - 1] for s, v in losses.items()}))
    alone = findings(made_study(*arms))[0]
    assert alone.survives and alone.adjusted_p == alone.estimate.p  # type: ignore[union-attr]
    for number in range(20):
        noise = {s: v + draw(0, 0.01) for s, v in losses.items()}
        arms.append(made_arm(f"noise{number}", noise))
    among = findings(made_study(*arms))
    assert among[0].word == "lower, not after Holm" and among[0].estimate == alone.estimate
    assert "not shown any more when corrected for 21 comparisons" in among[0].verdict
    assert not any(one.survives for one in among[1:])
    assert any(one.direction != "none" for one in among[1:])  # what the correction is for


def test_a_question_asked_both_ways_is_one_test() -> None:
    arms = [made_arm("A", {1: 3.49, 2: 3.588, 3: 3.436}), made_arm("B", SCRATCH)]
    asked = (Comparison("A", "B"), Comparison("B", "A"), Comparison("A", "B", "equal parameters"))
    found = findings(made_study(*arms, comparisons=asked))
    assert {one.compared for one in found} == {1}
    assert {one.adjusted_p for one in found} == {found[0].estimate.p}  # type: ignore[union-attr]


def test_a_null_study_is_wrong_as_often_as_it_says() -> None:
    """Arms that differ by seeds alone: about 5 % of verdicts are wrong, and no more."""
    draw = random.Random(3).gauss
    wrong = 0
    for _ in range(400):
        losses = {seed: 3.5 + draw(0, 0.05) for seed in (1, 2, 3)}
        same = {seed: loss + draw(0, 0.01) for seed, loss in losses.items()}
        wrong += only(same, losses).direction != "none"
    assert 8 <= wrong <= 34


def test_the_made_up_growth_study() -> None:
    signal, noise = findings(growth_study())
    assert signal.word == "lower" and noise.word == "no difference shown"


def without_runs(result: StudyResult, name: str) -> StudyResult:
    def cut(arm: Arm) -> Arm:
        return replace(arm, runs=()) if arm.name == name else arm

    return replace(result, arms=tuple(map(cut, result.arms)))


def test_unfinished_arms() -> None:
    words = [one.word for one in findings(without_runs(growth_study(), "signal"))]
    assert words == ["no statement", "no difference shown"]
