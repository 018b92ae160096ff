"""A run on a mixture: its order, its resume, its reports, and recipes that cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_runs import needs_sharding, recipe_values, write_text

from growkit.core.errors import UsageError
from growkit.training import Recipe, Silent, load_recipe, train
from growkit.training.checkpoints import list_checkpoints
from growkit.training.metrics import read_metrics
from growkit.training.read_recipe import make_recipe


class Listening(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def mixture_values(folder: Path, **training: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    rows = folder / "rows.jsonl"
    texts = [f"number {i} of many rows, all of them short" for i in range(200)]
    rows.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    values = recipe_values(write_text(folder / "king.txt"), **training)
    values["data"] = {
        "mixture": [
            {"name": "king", "files": [str(folder / "king.txt")], "weight": 0.7},
            {
                "name": "rows",
                "files": [str(folder)],
                "text_field": "body",
                "weight": {"from": 0.1, "to": 0.9},
            },
        ],
        "sequence_length": 16,
        "max_eval_tokens": 320,
    }
    values["data"]["mixture"][1]["files"] = [str(folder / "*.jsonl")]
    return values


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    folder = tmp_path_factory.mktemp("mixture")
    recipe = make_recipe(mixture_values(folder / "text"))
    train(recipe, folder / "run")
    return recipe, folder / "run"


def test_losses_and_use_of_every_source_are_reported(finished: tuple[Recipe, Path]) -> None:
    _, out = finished
    rows = read_metrics(out / "training" / "metrics.jsonl")
    for row in (row for row in rows if "eval_loss" in row):
        parts = [row["eval_loss/king"], row["eval_loss/rows"]]
        assert min(parts) < row["eval_loss"] < max(parts)
    use = json.loads((out / "growkit_training.json").read_text())["data"]
    # 48 samples: king from 7/8 to 7/16, rows the rest
    assert {name: entry["tokens"] // 16 for name, entry in use.items()} == {"king": 31, "rows": 17}
    assert use["king"]["epochs"] == round(31 * 16 / use["king"]["available_tokens"], 4)


def test_resumed_mixture_is_the_uninterrupted_one(
    finished: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, whole = finished
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for checkpoint in list_checkpoints(out / "training" / "checkpoints")[2:]:
        shutil.rmtree(checkpoint)
    for path in out.iterdir():
        if path.is_file():
            path.unlink()
    result = train(recipe, out)
    assert result.resumed_from is not None and result.resumed_from.endswith("checkpoint-6")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=needs_sharding)])
def test_two_processes_read_the_mixture_of_one(strategy: str, tmp_path: Path) -> None:
    """With separate documents, so that the two have different numbers of predicted tokens."""
    from process_runs import run
    from training_runs import TINY_GDA, assert_close

    values = mixture_values(tmp_path / "text")
    values["model"]["config"] = dict(TINY_GDA)
    values["data"] |= {"document_attention": "separate", "sequence_length": 64}
    values["data"]["max_eval_tokens"] = 640
    train(make_recipe(values), tmp_path / "one")
    values["parallel"] = {"strategy": strategy}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    run(2, ["train", str(recipe), "--out", str(tmp_path / "two")])
    assert_close(tmp_path / "two", tmp_path / "one", 1e-5)


def test_length_of_a_changing_mixture_is_kept(finished: tuple[Recipe, Path]) -> None:
    _, out = finished
    folder = out.parent / "text"
    with pytest.raises(UsageError, match="weights of its mixture change over it"):
        train(make_recipe(mixture_values(folder, max_steps=20)), out)


def test_many_epochs_are_warned_of(tmp_path: Path) -> None:
    values = mixture_values(tmp_path / "text", max_steps=3, warmup_steps=0, decay_steps=1)
    rows = tmp_path / "text" / "rows.jsonl"
    rows.write_text('{"body": "one two three"}\n{"body": "four five six seven eight nine"}\n')
    values["data"] |= {"eval_fraction": 0}
    del values["data"]["max_eval_tokens"]
    reporter = Listening()
    train(make_recipe(values), tmp_path / "run", reporter=reporter)
    assert [
        w for w in reporter.warnings if "source 'rows' is read" in w and "2305.16264" in w
    ] == []
    values["training"] |= {"max_steps": 30}
    train(make_recipe(values), tmp_path / "long", reporter=reporter)
    assert any("source 'rows' is read" in w and "2305.16264" in w for w in reporter.warnings)
    assert not any("'king'" in w for w in reporter.warnings)


SOURCE = {"name": "a", "files": "sample", "weight": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "exactly one of 'files', 'dataset', 'tokens' and 'mixture'"),
        ({"files": "sample", "mixture": [SOURCE]}, "exactly one of 'files', 'dataset'"),
        ({"mixture": []}, "'mixture' is empty"),
        ({"mixture": [SOURCE, SOURCE]}, "'a' stands twice"),
        ({"mixture": [{**SOURCE, "weight": {"from": 1, "to": 0}}]}, "are 0 at the last step"),
        ({"mixture": [{**SOURCE, "wieght": 1}]}, "'wieght'.*Did you mean 'weight'"),
        ({"mixture": [{**SOURCE, "weight": {"from": 1, "too": 0}}]}, "weight"),
        ({"mixture": [{**SOURCE, "weight": -1}]}, "weight"),
        ({"mixture": [{**SOURCE, "name": "a/b"}]}, "name"),
        ({"mixture": [{"name": "a", "weight": 1}]}, "exactly one of 'files'"),
        ({"dataset": {"path": "x", "streaming": True}}, "'streaming: true' needs 'max_tokens'"),
        ({"dataset": {"path": "x", "spilt": "train"}}, "'spilt'.*Did you mean 'split'"),
        ({"files": "sample", "document_attention": "both"}, "'joined' or 'separate'"),
    ],
)  # fmt: skip
def test_mistakes_in_the_data_section(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {"model": {"checkpoint": "x"}, "data": data, "training": {"max_steps": 1}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError, match=message):
        load_recipe(path)


def test_recipe_with_a_changing_weight_reads_back() -> None:
    weight = {"from": 0.5, "to": 2.0}
    values = {
        "model": {"checkpoint": "x"},
        "data": {"mixture": [{**SOURCE, "weight": weight}]},
        "training": {"max_steps": 1},
    }
    recipe = make_recipe(values)
    assert recipe.to_dict()["data"]["mixture"][0]["weight"] == weight
    assert make_recipe(recipe.to_dict()) == recipe
