"""Content keys: a finished run is found again as long as its result would be the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_studies import TINY_GDA, keep, nodes_of, opened, record_of, study_of, values

from growkit.core.errors import UsageError
from growkit.study.nodes import Nodes, SweepDiverged, Waiting
from growkit.study.run_records import read_record
from growkit.study.selection import Choice, choose
from growkit.study.texts import _fingerprint

RATES = [1e-3, "1e-2", 0.1]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    return nodes_of(tmp_path_factory.mktemp("keys") / "study")


def key(nodes: Nodes, name: str = "signal", seed: int = 0, **changes: Any) -> str:
    return other(nodes, **changes).node(name, seed).key


def other(nodes: Nodes, **changes: Any) -> Nodes:
    study, fingerprints = study_of(**changes), nodes.fingerprints
    return Nodes(study, nodes.shapes, nodes.records, fingerprints, nodes.tokenizer, nodes.cache)


def training(**changes: Any) -> dict[str, Any]:
    return {"training": values()["training"] | changes}


def section(name: str, **changes: Any) -> dict[str, Any]:
    return {name: values().get(name, {}) | changes}


def arm(**changes: Any) -> dict[str, Any]:
    arms = values()["arms"]
    return {"arms": arms | {"signal": arms["signal"] | changes}}


def base(**changes: Any) -> dict[str, Any]:
    return {"bases": {"small": values()["bases"]["small"] | changes}}


@pytest.mark.parametrize(
    "change",
    [
        training(learning_rate=2e-2),
        training(weight_decay=0.2),
        training(optimizer="muon"),
        training(decay_steps=0.5),
        training(bf16=True),
        section("data", max_eval_tokens=256),
        section("budget", tokens=1024),
        arm(grow={"signal_heads": "x2", "symmetry": "even"}),
        arm(grow={"signal_heads": "x2", "optimizer_state": "reset"}),
        arm(rewarm_steps=2),
        arm(attn_implementation="eager"),
        base(tokens=320),
        base(training={"schedule": "constant", "adam_beta2": 0.99}),
        {"measures": ["attention"]},
        {"series": ["head_similarity"]},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_the_result_changes_the_key(nodes: Nodes, change: dict[str, Any]) -> None:
    assert key(nodes, **change) != key(nodes)


def test_content_of_data_tokenizer_and_seed_are_part_of_it(nodes: Nodes) -> None:
    keys = {key(nodes), key(nodes, seed=1)}
    for name in ("data", "tokenizer"):
        changed = other(nodes)
        changed.fingerprints = {**nodes.fingerprints, name: "another"}
        keys.add(changed.node("signal", 0).key)
    assert len(keys) == 4


def test_config_of_a_checkpoint_is_part_of_it(nodes: Nodes, tmp_path: Path) -> None:
    """The same weights under another rope_theta are another model."""
    found = set()
    for theta in (10000.0, 10000.0, 500000.0):
        folder = tmp_path / f"small-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(nodes.shapes._drafted(nodes.study.bases["small"]), folder)
        config = json.loads((folder / "config.json").read_text()) | {"rope_theta": theta}
        (folder / "config.json").write_text(json.dumps(config))
        found.add(_fingerprint(folder))
    assert len(found) == 2


@pytest.mark.parametrize(
    "change",
    [
        section("data", workers=1),
        section("data", cache_dir="/elsewhere"),
        training(use_cpu=False),
        training(dataloader_num_workers=1),
        training(per_device_eval_batch_size=2),
        {"evaluations": 7},
        {"question": "Or not?", "target_loss": 3.0},
        {"seeds": [0, 1, 2]},
        arm(label="a label"),
        {"compare": [{"arm": "on", "against": "signal"}]},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_change_the_result_keeps_the_key(
    nodes: Nodes, change: dict[str, Any]
) -> None:
    assert key(nodes, **change) == key(nodes)


def test_the_same_text_under_another_path_has_the_same_keys(tmp_path: Path) -> None:
    def key_of(path: Path, text: str) -> str:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text * 200)
        study = study_of(
            data={"files": [str(path)], "sequence_length": 16},
            arms={"one": {"config": TINY_GDA}},
            budget={"training_flops": 1e9},
        )
        return nodes_of(path.parent / "study", study, runs=tmp_path / "runs").node("one", 0).key

    first = key_of(tmp_path / "here" / "a.txt", "the king of France spoke to his daughter\n")
    same = key_of(tmp_path / "there" / "b.txt", "the king of France spoke to his daughter\n")
    assert first == same
    assert key_of(tmp_path / "c" / "a.txt", "the queen of France spoke to him\n") != first


def test_a_base_is_the_same_whatever_the_arms_are_measured_by(nodes: Nodes) -> None:
    assert key(nodes, "small", measures=["attention"]) == key(nodes, "small")


def test_arms_share_their_base(nodes: Nodes) -> None:
    signal, on = nodes.node("signal", 0), nodes.node("on", 0)
    assert signal.parent is not None and on.parent is not None
    assert signal.parent.key == on.parent.key == nodes.node("small", 0).key
    assert [one.first_step for one in on.lineage] == [0, 6]


def sweeping(tmp_path: Path) -> Nodes:
    scratch = {"shape_of": "signal", "training": {"learning_rate": RATES}}
    arms = values()["arms"] | {"scratch": scratch}
    study = study_of(**training(learning_rate={"of": "scratch"}), arms=arms)
    return nodes_of(tmp_path / "study", study)


def test_a_rate_is_chosen_by_its_trials_and_goes_to_all_that_name_it(tmp_path: Path) -> None:
    nodes = sweeping(tmp_path)
    with pytest.raises(Waiting) as waiting:
        nodes.node("signal", 0)
    trials = waiting.value.nodes
    assert [trial.recipe["training"]["learning_rate"] for trial in trials] == [1e-3, 1e-2, 0.1]
    whole = nodes.lengths.steps("scratch")
    assert {trial.steps for trial in trials} == {int(0.3 * whole)} and 0.3 * whole > 1
    for trial, loss in zip(trials, (3.0, 2.0, 2.5), strict=True):
        rate = trial.recipe["training"]["learning_rate"]
        keep(nodes, record_of(nodes, trial.key, loss, learning_rate=rate))
    for name in ("small", "signal", "scratch"):
        assert nodes.node(name, 0).recipe["training"]["learning_rate"] == 1e-2
    sweep = nodes.sweep("scratch")
    assert sweep is not None and sweep.chosen == 1e-2 and not sweep.at_edge


def test_a_rate_that_diverged_is_not_chosen_and_all_of_them_are_an_error(tmp_path: Path) -> None:
    for lost in (1, 3):
        nodes = sweeping(tmp_path / str(lost))
        for i, trial in enumerate(nodes.trials("scratch")):
            changes = {"learning_rate": trial.recipe["training"]["learning_rate"]}
            why = "The loss is nan at step 3." if i < lost else None
            keep(nodes, record_of(nodes, trial.key, 2.0 + i, diverged=why, **changes))
        if lost == 1:
            assert nodes.learning_rate("scratch") == 1e-2
        else:
            with pytest.raises(SweepDiverged, match=r"'scratch' diverged: 0\.001, 0\.01, 0\.1"):
                nodes.node("signal", 0)


def test_a_record_of_another_study_is_copied(nodes: Nodes, tmp_path: Path) -> None:
    study = opened(tmp_path / "study", runs=tmp_path / "runs")
    key = study.nodes.node("small", 0).key
    record_of(nodes, key, 2.25).write(tmp_path / "runs" / key / "record.json")
    found = study.records.get(key)
    assert found is not None and found.last_loss == 2.25
    assert read_record(tmp_path / "study" / "records" / f"{key}.json") == found


def test_a_damaged_record_is_none(nodes: Nodes, tmp_path: Path) -> None:
    study = opened(tmp_path / "study")
    key = study.nodes.node("small", 0).key
    own = tmp_path / "study" / "records" / f"{key}.json"
    record_of(nodes, key).write(own)
    (tmp_path / "study" / "study.yaml").touch()
    whole = own.read_text()
    for text in (whole[: len(whole) // 2], whole.replace('"format": 1', '"format": 0'), "[]", ""):
        own.write_text(text)
        assert opened(tmp_path / "study").records.get(key) is None
    assert next(iter(study.wanted(choose(study.recipe)))).key == key


def test_choosing_arms_and_seeds() -> None:
    study = study_of(seeds=[0, 1, 2])
    assert choose(study, ["scratch", "on"], [2, 0]) == Choice(("on", "scratch"), (0, 2))
    with pytest.raises(UsageError, match="--arms names 'sratch'"):
        choose(study, ["sratch"])
    with pytest.raises(UsageError, match="--seeds names 7"):
        choose(study, [], [7])
