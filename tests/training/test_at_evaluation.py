# SPDX-License-Identifier: Apache-2.0
"""Beside the loss: names in trackers, samples, tasks, early stopping, callbacks by import path."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from grown_runs import continue_recipe, make_source
from training_runs import figures, make, weights
from transformers import TrainerCallback

from growkit.core.errors import UsageError
from growkit.report import read_runs, write_report
from growkit.training import train
from growkit.training.at_evaluation import named_callbacks, utilisation_of
from growkit.training.metrics import read_metrics
from growkit.training.trainer import named_for_trackers


class Counting(TrainerCallback):
    steps = 0

    def __init__(self, by: int = 1) -> None:
        self.by = by

    def on_step_end(self, *_: Any, **__: Any) -> None:
        Counting.steps += self.by


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("somebodys_callbacks")
    module.Counting = Counting  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_callbacks", module)
    monkeypatch.setattr(Counting, "steps", 0)
    return "somebodys_callbacks:Counting"


def test_held_out_figures_are_named_for_eval() -> None:
    named = named_for_trackers({"eval_loss": 1.0, "perplexity": 2.7, "eval_loss/web": 0.0})
    assert named == {
        "eval_loss": 1.0, "eval_perplexity": 2.7, "eval_loss/web": 0.0, "eval_perplexity/web": 1.0,
    }  # fmt: skip


def test_samples_callbacks_and_trackers(text_file: Path, tmp_path: Path, counting: str) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    common = {"max_steps": 4, "decay_steps": 1, "eval_steps": 2}
    plain = train(make(text_file, **common), tmp_path / "plain").out
    recipe = make(
        text_file,
        **common,
        report_to=["tensorboard"],
        samples={"prompts": ["the old", "wine <b>"], "max_new_tokens": 5},
        callbacks=[{counting: {"by": 10}}],
        peak_flops_per_second=1e9,
    )
    out = train(recipe, tmp_path / "run").out
    assert Counting.steps == 40
    # Bit for bit the run without.
    assert weights(out) == weights(plain)
    rows = read_metrics(out / "training" / "metrics.jsonl")
    extra = ("samples", "mfu")
    assert [{k: v for k, v in r.items() if k not in extra} for r in figures(out)] == figures(plain)
    held_out = [row for row in rows if "eval_loss" in row]
    assert [len(row["samples"]) for row in held_out] == [2, 2, 2]
    assert held_out[0]["samples"][0]["prompt"] == "the old"
    events = EventAccumulator(str(out / "training" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    logged = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags["scalars"]}
    for key, tag in {
        "loss": "train/loss", "tokens_per_second": "train/tokens_per_second", "mfu": "train/mfu",
        "eval_loss": "eval/loss", "perplexity": "eval/perplexity",
        "bits_per_byte": "eval/bits_per_byte",
    }.items():  # fmt: skip
        wanted = {row["step"]: row[key] for row in rows if key in row}
        assert logged[tag] == pytest.approx(wanted), tag
    assert {t for t in logged if "perplexity" in t} == {"eval/perplexity"}
    assert any(tag.startswith("eval/sample/2") for tag in tags["tensors"])
    write_report(read_runs([out]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Samples</h2>" in page and "wine &lt;b&gt;" in page


def test_early_stopping_ends_and_the_same_command_knows_it(text_file: Path, tmp_path: Path) -> None:
    recipe = make(
        text_file, max_steps=12, eval_steps=2, save_steps=12, learning_rate=1e-9, decay_steps=1,
        early_stopping={"patience": 2, "threshold": 0.5},
    )  # fmt: skip
    result = train(recipe, tmp_path / "run")
    # The loss at 2 is the first to beat; those at 4 and 6 are not lower by half a nat.
    assert result.steps == 6
    record = json.loads((result.out / "growkit_training.json").read_text())
    assert record["stopped_early"] is True and record["steps"] == 6
    before = weights(result.out)
    assert train(recipe, tmp_path / "run").steps == 6
    assert weights(result.out) == before


def test_callbacks_that_cannot_be(counting: str) -> None:
    for entry, why in (
        ("no_such_module:X", "ModuleNotFoundError"),
        ("json:NoSuch", "AttributeError"),
        ({counting: {"of": 1}}, "unexpected keyword argument 'of'"),
        ("pathlib:Path", "is no transformers TrainerCallback"),
    ):
        with pytest.raises(UsageError, match=why):
            named_callbacks([entry])
    (found,) = named_callbacks([counting])
    assert isinstance(found, Counting) and found.by == 1


@pytest.mark.parametrize(
    ("training", "data", "why"),
    [
        ({"callbacks": ["module.Class"]}, {}, "say module:Class"),
        ({"samples": {"prompts": ["a"]}}, {"eval_fraction": 0}, "comes with evaluations"),
        ({"samples": {"prompts": []}}, {}, "at least 1"),
    ],
)
def test_recipes_that_cannot_be(
    text_file: Path, training: dict[str, Any], data: dict[str, Any], why: str
) -> None:
    from training_runs import recipe_values

    from growkit.training.read_recipe import make_recipe

    values = recipe_values(text_file, **training)
    values["data"] |= data
    with pytest.raises(UsageError, match=why):
        make_recipe(values)


def test_tasks_without_the_harness(text_file: Path, tmp_path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm-evaluation-harness is installed")
    recipe = make(text_file, eval_tasks={"tasks": ["hellaswag"]})
    with pytest.raises(UsageError, match=r"training\.eval_tasks needs lm-evaluation-harness"):
        train(recipe, tmp_path / "run")


def test_utilisation(text_file: Path) -> None:
    from training_runs import TINY_LLAMA
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {k: v for k, v in TINY_LLAMA.items() if k != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**fields, vocab_size=257))
    assert utilisation_of(make(text_file), model, 1) is None  # the recipe says use_cpu
    known = utilisation_of(make(text_file, peak_flops_per_second=1e9), model, 2)
    # 6 FLOPs a weight of a product and token, and those of attention; over 2 devices of 1e9
    matrices = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32) + 257 * 16
    assert known is not None and 6 * matrices / 2e9 < known < 8 * matrices / 2e9


def test_the_card_of_a_trained_model(text_file: Path, tmp_path: Path) -> None:
    source = make_source(text_file, tmp_path / "source")
    (source / "README.md").write_text(
        "---\nlicense: mit\nlanguage: [en]\ntags: [own]\nbase_model: other/one\n---\n# parent\n"
    )
    (source / "LICENSE").write_text("MIT\n")
    recipe = continue_recipe(text_file, source, max_steps=4, decay_steps=1, eval_steps=2)
    out = train(recipe, tmp_path / "run").out
    assert (out / "LICENSE").read_text() == "MIT\n"
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit" and front["tags"] == ["own", "growkit"]
    assert front["base_model"] == "other/one" and front["language"] == ["en"]
    assert "Trained from `source` by growkit" in card and str(tmp_path) not in card
    losses = [row for row in read_metrics(out / "training" / "metrics.jsonl") if "eval_loss" in row]
    assert [f"| {row['eval_loss']:.4f} |" in card for row in losses] == [True] * 3
    assert "| data | 256 |" in card


def test_tasks_stand_on_every_second_evaluation(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness itself is stood in for; it is tried in tests/evaluation/test_harness.py."""
    from growkit.evaluation import harness

    asked = []

    def run_tasks(loaded: Any, tasks: list[str], **options: Any) -> dict[str, dict[str, Any]]:
        asked.append((tasks, options["limit"], loaded.model.training))
        torch.manual_seed(1234)  # as the harness does
        return {"copa": {"samples": 3, "acc": 0.5, "note": "text"}}

    monkeypatch.setattr(harness, "check_installed", lambda what: None)
    monkeypatch.setattr(harness, "run_tasks", run_tasks)
    common = {"max_steps": 4, "decay_steps": 1, "eval_steps": 1, "save_steps": 4}
    tasks = {"tasks": ["copa"], "every": 2, "limit": 3}
    out = train(make(text_file, **common, eval_tasks=tasks), tmp_path / "run").out
    rows = [r for r in read_metrics(out / "training" / "metrics.jsonl") if "eval_loss" in r]
    assert [row["step"] for row in rows if "eval_task/copa/acc" in row] == [0, 2, 4]
    assert asked == [(["copa"], 3, False)] * 3
    assert weights(out) == weights(train(make(text_file, **common), tmp_path / "plain").out)
