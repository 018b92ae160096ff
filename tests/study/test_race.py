"""Successive halving over a study's arms, on made-up records: nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_studies import STEP, keep, opened, record_of, study_of, values

from growkit.core.errors import UsageError
from growkit.study.page import markdown, study_page
from growkit.study.race import race_lines
from growkit.study.recipe import StudyRecipe
from growkit.study.results import result_from
from growkit.study.selection import choose
from growkit.study.study import Study

ARMS = {
    name: {"base": "small", "training": {"learning_rate": rate}}
    for name, rate in zip("abcde", (1e-3, 2e-3, 3e-3, 4e-3, 5e-3), strict=True)
}
SHORT = {"a": 4.0, "b": 3.0, "c": 5.0, "d": 3.5, "e": 4.5}
NEXT = {"b": 2.9, "d": 2.8, "a": 2.7}


def recipe(**race: Any) -> StudyRecipe:
    return study_of(
        arms=values()["arms"] | ARMS,
        budget={"tokens": 26 * STEP, "arm": "on"},
        race={"shares": [0.25, 0.5], "survivors": 2} | race,
    )


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return opened(tmp_path / "study", recipe())


def ran(study: Study, losses: dict[str, float], share: float) -> None:
    for arm, loss in losses.items():
        node = study.nodes.short(arm, 0, share)
        keep(study.nodes, record_of(study.nodes, node.key, loss))


def finish(study: Study, **losses: float) -> None:
    for arm, loss in losses.items():
        node = study.nodes.node(arm, 0)
        for one in node.lineage:
            keep(study.nodes, record_of(study.nodes, one.key, loss))


def test_halves_until_the_survivors_run_to_the_budget(study: Study) -> None:
    choice = choose(study.recipe, list(ARMS))
    study.start_race(choice)
    assert study.race is not None and study.race.runs() == 1 + 5 + 3 + 2  # with the base
    missing, survivors = study.race.wanted()
    assert survivors is None and len(missing) == 5
    steps = {node.steps for node in missing}
    assert steps == {study.nodes.lengths.steps("a") // 4}

    ran(study, SHORT, 0.25)
    missing, _ = study.race.wanted()
    assert {node.name.split(",")[0] for node in missing} == {"b", "d", "a"}
    ran(study, NEXT, 0.5)
    missing, survivors = study.race.wanted()
    assert not missing and survivors is not None and survivors.arms == ("a", "d")


def test_the_page_says_how_often_the_short_order_was_the_final_one(study: Study) -> None:
    study.start_race(choose(study.recipe, list(ARMS)))
    ran(study, SHORT, 0.25)
    ran(study, NEXT, 0.5)
    race = study.result().race
    assert race is not None and race.agreement == ((0, 0), (0, 0))
    assert "no two of its arms ran to the budget" in " ".join(race_lines(race, {}))

    finish(study, a=2.0, d=2.1, b=2.2)  # b ran in an earlier study
    result = study.result()
    assert result.race is not None
    # After a quarter: b < d < a, and in the end a < d < b. After a half: a < d < b.
    assert result.race.agreement == ((0, 3), (3, 3))
    text = markdown(result)
    assert "in 0 of 3 pairs that ran to the budget" in text
    assert "in 3 of 3 pairs" in text and "Put out by the race" in text
    assert "The race" in study_page(result, [])
    assert result_from(json.loads(json.dumps(result.to_dict()))) == result


def test_without_a_race_nothing_is_said_of_one(study: Study) -> None:
    result = study.result()
    assert "race" not in result.to_dict()
    assert "The race" not in study_page(result, []) and "race" not in markdown(result)


def test_what_has_no_loss_is_put_out(study: Study) -> None:
    study.start_race(choose(study.recipe, list(ARMS)))
    assert study.race is not None
    ran(study, {arm: loss for arm, loss in SHORT.items() if arm not in ("b", "d")}, 0.25)
    for arm in ("b", "d"):
        study.failed[study.nodes.short(arm, 0, 0.25).key] = "it broke"
    missing, _ = study.race.wanted()
    assert {node.name.split(",")[0] for node in missing} == {"a", "c", "e"}


def test_keys_of_runs_are_those_of_the_study_without_a_race(study: Study, tmp_path: Path) -> None:
    plain = opened(tmp_path / "plain", study_of(**_without_race()))
    assert plain.nodes.node("a", 0).key == study.nodes.node("a", 0).key
    assert study.nodes.short("a", 0, 0.25).key != study.nodes.node("a", 0).key


def _without_race() -> dict[str, Any]:
    return {
        "arms": values()["arms"] | ARMS,
        "budget": {"tokens": 26 * STEP, "arm": "on"},
    }


def test_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 candidates, and 2 survive"):
        study.start_race(choose(study.recipe, ["a", "b"]))
    with pytest.raises(UsageError, match="larger than the last"):
        recipe(shares=[0.5, 0.25])
    tiny = opened(tmp_path / "tiny", recipe(shares=[0.001]))
    with pytest.raises(UsageError, match="less than one step"):
        tiny.start_race(choose(tiny.recipe, list(ARMS)))
