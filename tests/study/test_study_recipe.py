"""What a study recipe may say: every refusal is a sentence that names the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_studies import TINY_GDA, study_of, values

from growkit.core.errors import UsageError
from growkit.recipe.shipped import recipe_folder
from growkit.study.read_recipe import load_study, make_study


def changed(path: str, value: Any) -> dict[str, Any]:
    """The tiny study with one value set (``None`` removes it)."""
    whole = values()
    *parents, last = path.split(".")
    place = whole
    for parent in parents:
        place = place.setdefault(parent, {})
    if value is None:
        place.pop(last)
    else:
        place[last] = value
    return whole


CONFIG = {"config": TINY_GDA}
REFUSED = [
    ("question", None, "'question' is missing"),
    ("arms.signal.growth", {}, "unknown key 'growth' in section 'arms.signal'"),
    ("arms", {}, "arms is {}"),
    ("seeds", [1, 1], "a seed stands twice"),
    ("budget", {"tokens": 5}, "so many tokens of that arm"),
    ("budget", {"tokens": 5, "arm": "on", "training_flops": 1e9}, "exactly one of"),
    ("budget.arm", "of", "budget.arm is 'of', which the recipe does not define"),
    ("bases.small.training_flops", 1e9, "exactly one of 'training_flops' and 'tokens'"),
    ("arms.small", {"base": "small"}, "'small' is the name of a base and of an arm"),
    ("arms.signal.base", "smal", "arms.signal.base is 'smal'"),
    ("arms.scratch.shape_of", "small", "arms.scratch.shape_of is 'small'"),
    ("arms.on.training.learning_rate", {"of": "x"}, "arms.on.training.learning_rate.of is 'x'"),
    ("training.learning_rate", {"of": "x"}, "training.learning_rate.of is 'x'"),
    ("training.learning_rate", {"of": "on"}, "continues from itself: small -> on -> small"),
    ("training.learning_rate", {"from": "on"}, "training.learning_rate is {'from': 'on'}"),
    ("compare", [{"arm": "signal", "against": "no"}], "compare[0].against is 'no'"),
    ("bases.small", {"base": "small", "tokens": 99}, "continues from itself: small -> small"),
    ("arms.signal", {"shape_of": "scratch"}, "signal -> scratch -> signal"),
    ("arms.on", {"base": "small", **CONFIG}, "exactly one of 'config', 'checkpoint'"),
    ("arms.on", {}, "exactly one of 'config', 'checkpoint', 'base' and 'shape_of'"),
    ("arms.on", {"config": {"hidden_size": 4}}, "'config' needs a model_type"),
    ("arms.on", {**CONFIG, "grow": {"ffn": "x2"}}, "need a 'base' or a 'checkpoint'"),
    ("arms.on", {**CONFIG, "rewarm_steps": 3}, "'rewarm_steps' follows a 'base'"),
    ("arms.signal.convert", {"to": "diff_v2"}, "put the first into a base"),
    ("arms.signal.grow", {"signal": "x2"}, "arms.signal: The recipe has an unknown key 'signal'"),
    ("arms.signal.grow", {}, "arms.signal: Nothing to grow"),
    ("arms.signal.grow", {"ffn": "much"}, "arms.signal: "),
    ("arms.on.convert", {"ratio": 3}, "arms.on: The recipe has a 'convert' without 'to'"),
    ("arms.on.convert", {"to": "diff_v2", "rate": 3}, "unknown key 'rate' under 'convert'"),
    ("arms.on.training.max_steps", 3, "'max_steps', which is set by the study itself"),
    ("training.seed", 3, "'seed', which is set by the study itself"),
    ("training.logging_steps", 3, "'logging_steps', which is set by the study itself"),
    ("training.save_steps", 3, "'save_steps', which is set by the study itself"),
    ("training.learn_rate", 3, "'learn_rate', which is not known"),
    (
        "arms.on.training.per_device_train_batch_size",
        2,
        "'per_device_train_batch_size', which all arms share",
    ),
    ("training.learning_rate", [], "learning_rate is []"),
    ("training.learning_rate", [0.001, "1e-3"], "Give different rates"),
    ("training.learning_rate", [0.001, -1], "learning_rate is -1"),
    ("training.weight_decay", "much", "training.weight_decay is 'much'"),
    ("arms.signal.training.schedule", "cosine", "continues from a base with schedule 'cosine'"),
    ("tokenizer", None, "needs a 'tokenizer' section"),
    ("data.eval_fraction", 0, "Arms are compared by their held-out loss"),
    ("series", ["similarity"], "series.0 is 'similarity'"),
    ("sweep.share", 1.5, "sweep.share is 1.5"),
]


@pytest.mark.parametrize(("path", "value", "said"), REFUSED)
def test_what_no_study_can_do_is_refused_in_a_sentence(path: str, value: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_study(changed(path, value))
    assert said in f"{caught.value.cause} {caught.value.remedy}"
    assert caught.value.remedy


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_one(tmp_path: Path) -> None:
    text = yaml.safe_dump(changed("arms.signal.labl", "x"), sort_keys=False)
    (tmp_path / "study.yaml").write_text(text)
    line = next(n for n, row in enumerate(text.splitlines(), 1) if "labl" in row)
    with pytest.raises(UsageError, match=f"line {line}: unknown key 'labl'") as caught:
        load_study(tmp_path / "study.yaml")
    assert "'label'" in caught.value.remedy


def test_a_mixture_must_not_change_over_runs_of_different_lengths(tmp_path: Path) -> None:
    parts: list[dict[str, Any]] = [
        {"name": "a", "weight": 1, "files": "sample"},
        {"name": "b", "weight": {"from": 1, "to": 2}, "files": "sample"},
    ]
    data = {"mixture": parts, "sequence_length": 16}
    with pytest.raises(UsageError, match="'b' a weight that changes"):
        study_of(data=data)
    parts[1]["weight"] = {"from": 2, "to": 2}
    study_of(data=data)


def test_a_value_can_be_set_and_the_recipe_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values()))
    study = load_study(tmp_path / "study.yaml", ["seeds=[3,4]", "arms.on.label=going on"])
    assert study.seeds == [3, 4] and study.arms["on"].label == "going on"
    assert make_study(yaml.safe_load(yaml.safe_dump(study.to_dict()))) == study


@pytest.mark.parametrize("path", sorted(recipe_folder().glob("study-*.yaml")), ids=lambda p: p.stem)
def test_shipped_studies_are_valid(path: Path) -> None:
    assert load_study(path).question
