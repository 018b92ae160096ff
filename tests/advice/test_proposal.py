"""Proposals for a budget: recipes that train --dry-run accepts, sources that say what is cited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny

from growkit.advice.proposal import STUDIES, propose, read_budget
from growkit.cli.main import main
from growkit.core.errors import UsageError
from growkit.core.yaml_files import parse_yaml

ROOT = Path(__file__).parents[2]


def target(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with a config.json alone."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LLAMA = tiny.llama_config(num_hidden_layers=8, vocab_size=300)


@pytest.mark.parametrize(
    ("kind", "config"),
    [("llama", LLAMA), ("gda", tiny.gda_config(num_hidden_layers=4, vocab_size=300))],
)
def test_a_target_becomes_a_staged_recipe_that_train_accepts(
    kind: str, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, recipe = target(tmp_path / kind, config), str(tmp_path / "recipe.yaml")
    flags = ["--budget", "2Mtokens", "--save-recipe", recipe]
    assert main(["plan", str(folder), *flags, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert all(line["source"] and line["why"] for line in made["choices"])
    assert made["flops"] < 0.65 * made["scratch_flops"]
    values = parse_yaml(Path(recipe).read_text(), recipe)
    assert values == made["recipe"]
    stage = values["stages"][0]
    steps = values["training"]["max_steps"]
    layers = config["num_hidden_layers"]
    assert values["model"]["config"]["num_hidden_layers"] == (2 if layers >= 8 else 1)
    assert stage["grow"]["layers"] == config["num_hidden_layers"]
    assert stage["grow"]["new_layers"] == "random"
    decays_from = (1 - values["training"]["decay_steps"]) * steps
    assert values["training"]["warmup_steps"] < stage["at"]["steps"] < decays_from
    assert main(["train", recipe, "--dry-run", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()

    assert main(["advise", str(folder), "--budget", "2Mtokens", "--out", recipe]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["plan", str(folder), "--budget", "2Mtokens", "--ffn", "x2"]) == 2
    assert "--ffn" in capsys.readouterr().err


def test_a_checkpoint_grows_once_after_its_warm_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.make_folder(tmp_path / "a", tiny.llama_config())
    recipe = str(tmp_path / "recipe.yaml")
    assert main(["advise", str(source), "--budget", "3e12 flops", "--out", recipe]) == 0
    said = capsys.readouterr().out
    assert "alternative: train on without growth" in said and "arXiv:2510.08008" in said
    values = parse_yaml(Path(recipe).read_text(), recipe)
    stage, training = values["stages"][0], values["training"]
    assert values["model"]["checkpoint"] == str(source)
    assert stage["grow"] == {"layers": 4, "new_layers": "interposed"}
    assert stage["at"]["steps"] == training["warmup_steps"]


def test_flops_buy_the_tokens_that_they_cost(tmp_path: Path) -> None:
    folder = target(tmp_path / "llama", LLAMA)
    by_tokens = propose(folder, "4e6tokens")
    by_flops = propose(folder, f"{by_tokens.flops}flops")
    assert by_flops.tokens == pytest.approx(by_tokens.tokens, rel=0.01)
    longer = parse_yaml(propose(folder, "40Mtokens").recipe, "recipe")
    assert longer["training"]["decay_steps"] == 0.1  # past 20 tokens a parameter: later
    assert longer["stages"][0]["at"]["steps"] / longer["training"]["max_steps"] > 0.79


def test_what_is_cited_stands_in_the_committed_study() -> None:
    for study, words in STUDIES.values():
        table = (ROOT / "benchmarks" / "studies" / study / "table.md").read_text()
        assert words in table, study
        assert words.replace("0.", "0.9", 1) not in table  # negative control: another figure


@pytest.mark.parametrize(
    "text", ["", "5", "tokens", "-3tokens", "1.2.3tokens", "0tokens", "3 cats"]
)
def test_no_budget(text: str) -> None:
    with pytest.raises(UsageError, match="is no budget"):
        read_budget(text)


def test_budgets() -> None:
    assert read_budget("20M tokens") == (2e7, "tokens")
    assert read_budget("3.5e17FLOPs") == (3.5e17, "flops")
    assert read_budget("2ktokens") == (2e3, "tokens")


def test_what_no_growth_fits(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too few to train"):
        propose(target(tmp_path / "a", LLAMA), "2000tokens")
    with pytest.raises(UsageError, match="nothing to grow late"):
        propose(target(tmp_path / "b", LLAMA | {"num_hidden_layers": 1}), "2Mtokens")
