"""Schedules, weight decay, evaluation and what a run writes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from training_runs import TINY_GDA, TINY_LLAMA, make, recipe_values

from growkit.core.errors import CheckpointError, GrowkitError, UsageError
from growkit.data.packing import PackedDataset
from growkit.training import train
from growkit.training.evaluate import evaluate
from growkit.training.growth.slots import SlotMap
from growkit.training.metrics import plot_losses, read_metrics, truncate_metrics
from growkit.training.optimizer import parameter_groups
from growkit.training.read_recipe import make_recipe
from growkit.training.schedule import learning_rate_factor


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = recipe_values(text_file, save_total_limit=2)
    values["model"]["config"] = dict(TINY_GDA)
    out = tmp_path_factory.mktemp("gda") / "run"
    train(make_recipe(values), out)
    return out


def test_logged_learning_rate_follows_the_schedule(finished: Path) -> None:
    rows = read_metrics(finished / "training" / "metrics.jsonl")
    logged = {row["step"]: row["learning_rate"] for row in rows if "loss" in row}
    recipe = make_recipe(yaml.safe_load((finished / "training" / "recipe.yaml").read_text()))
    factor, peak = learning_rate_factor(recipe), recipe.training.learning_rate
    assert logged == pytest.approx({step: peak * factor(step - 1) for step in logged})
    assert {1, 2, 3, 4, 6, 12} <= logged.keys()


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_only_matrices_decay(decay_embeddings: bool, text_file: Path) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    import growkit.modeling  # noqa: F401

    values = {**TINY_GDA, "vocab_size": 32, "hidden_act": "poly_norm"}
    config = CONFIG_MAPPING[values.pop("model_type")](**values)
    model = AutoModelForCausalLM.from_config(config)
    recipe = make(text_file, decay_embeddings=decay_embeddings)
    groups = parameter_groups(model, recipe.training, SlotMap({}))
    names = {name for group in groups if group["weight_decay"] for name, _ in group["params"]}
    free = {name for name, _ in model.named_parameters()} - names
    for part in ("lambda_q1", "subln", "layernorm", "model.norm", "act_fn"):
        assert any(part in name for name in free)
    assert not any("_proj" in name for name in free)
    assert ("model.embed_tokens.weight" in names) == decay_embeddings


def test_evaluation_weighs_every_token_equally(finished: Path) -> None:
    """Against the definition, one sequence at a time; a short last batch must not matter."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float64)
    tokens = np.random.default_rng(0).integers(0, 257, 5 * 16).astype(np.uint16)
    dataset = PackedDataset(tokens, 16)
    total = 0.0
    for i in range(5):
        ids = dataset[i]["input_ids"][None]
        with torch.no_grad():
            log_p = model(input_ids=ids).logits.log_softmax(-1)
        total -= sum(log_p[0, t, ids[0, t + 1]].item() for t in range(15))
    for batch_size in (1, 2, 5, 8):
        result = evaluate(model, dataset, batch_size=batch_size, bytes_per_token=2.0)
        assert result["eval_loss"] == pytest.approx(total / 75, abs=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(total / 75), rel=1e-5)
        assert result["bits_per_byte"] == pytest.approx(total / 75 / math.log(2) / 2, abs=1e-6)


def test_evaluation_of_a_certain_model() -> None:
    """A model that gives every token the same logit has the vocabulary as its perplexity."""

    class Uniform(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(logits=torch.zeros(*input_ids.shape, 257))

    result = evaluate(Uniform(), PackedDataset(np.arange(64, dtype=np.uint16), 16), batch_size=3)
    assert result["perplexity"] == pytest.approx(257)


def test_run_folder(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert type(model).__name__ == "GdaForCausalLM" and len(tokenizer) == 257
    assert model.config.eos_token_id == tokenizer.eos_token_id
    folder = finished / "training"
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["checkpoint-12", "checkpoint-9"]  # save_total_limit
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in held_out] == [0, 4, 8, 12]
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"] - 0.5
    assert all(row["tokens"] == row["step"] * 64 for row in rows)
    png = (folder / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 5000
    record = json.loads((finished / "growkit_training.json").read_text())
    assert record["eval_loss"] == held_out[-1]["eval_loss"]
    assert record["steps"] == 12 and record["tokens"] == 768
    assert not list(finished.rglob("*.partial"))


def test_trained_model_keeps_its_kv_cache(finished: Path) -> None:
    """transformers trains with use_cache off; whoever loads the result wants the cache."""
    for folder in (finished, finished / "training" / "checkpoints" / "checkpoint-12"):
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True


def test_published_model_is_the_last_checkpoint(finished: Path) -> None:
    last = finished / "training" / "checkpoints" / "checkpoint-12" / "model.safetensors"
    assert (finished / "model.safetensors").read_bytes() == last.read_bytes()


def test_continuing_keeps_the_lineage(finished: Path, text_file: Path, tmp_path: Path) -> None:
    """growkit.json goes along as bytes, and the growkit block of config.json stays."""
    source = tmp_path / "grown"
    shutil.copytree(finished, source)
    manifest = b'{"lineage":   ["parent"]}\n'
    (source / "growkit.json").write_bytes(manifest)
    config = json.loads((source / "config.json").read_text())
    block = {"parent": "abc", "axes": {"signal_head": [3, 6]}}
    (source / "config.json").write_text(json.dumps({**config, "growkit": block}))
    values = recipe_values(text_file, max_steps=3, warmup_steps=0, decay_steps=1)
    values["model"] = {"checkpoint": str(source)}
    del values["tokenizer"]
    result = train(make_recipe(values), tmp_path / "on")
    assert (result.out / "growkit.json").read_bytes() == manifest
    assert json.loads((result.out / "config.json").read_text())["growkit"] == block
    assert (result.out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    start = read_metrics(result.metrics)[0]
    end = read_metrics(finished / "training" / "metrics.jsonl")[-1]
    assert start["step"] == 0
    assert start["eval_loss"] == pytest.approx(end["eval_loss"], abs=1e-6)


def test_damaged_source_is_refused(finished: Path, text_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(finished, source)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    values = recipe_values(text_file)
    values["model"] = {"checkpoint": str(source)}
    del values["tokenizer"]
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        train(make_recipe(values), tmp_path / "run")
    with pytest.raises(UsageError, match="is the checkpoint that the run starts from"):
        train(make_recipe(values), source)
    values["model"] = {"checkpoint": str(tmp_path / "absent")}
    with pytest.raises(UsageError, match="is not a folder"):
        train(make_recipe(values), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_foreign_folder_is_not_written_into(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not empty and holds no training run"):
            train(make(text_file), tmp_path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_loss_that_is_not_a_number_stops_the_run(text_file: Path, tmp_path: Path) -> None:
    recipe = make(text_file, learning_rate=1e30, warmup_steps=0, max_grad_norm=0.0)
    with pytest.raises(GrowkitError, match=r"is (nan|inf) at step \d"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_sequence_longer_than_the_model(text_file: Path, tmp_path: Path) -> None:
    values = recipe_values(text_file)
    values["data"] |= {"sequence_length": 65, "max_eval_tokens": 400}
    with pytest.raises(UsageError, match=r"sequence_length is 65 .* positions for 64"):
        train(make_recipe(values), tmp_path / "run")


def test_vocabulary_smaller_than_the_tokenizer(text_file: Path, tmp_path: Path) -> None:
    values = recipe_values(text_file)
    values["model"]["config"] = {**TINY_LLAMA, "vocab_size": 100}
    with pytest.raises(UsageError, match="257 tokens and the model's vocabulary 100"):
        train(make_recipe(values), tmp_path / "run")


def test_processes_that_cannot_meet_are_refused(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="cannot find each other"):
        train(make(text_file), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_survive_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = '{"step": 1, "tokens": 8, "loss": 2.0}\n'
    path.write_text(first + '{"step": 2, "tokens": 16, "loss": 1.5}\n{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    truncate_metrics(path, 1)
    assert path.read_text() == first


def test_no_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    rows = [{"step": 1, "tokens": 1, "loss": 2.0}]
    assert plot_losses([("a", rows, 0)], tmp_path / "a.png", title="t", marks=[(1, "grown")])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plot_losses([("a", rows, 0)], tmp_path / "b.png", title="t")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png"]


@pytest.mark.parametrize("option", ["bf16", "gradient_checkpointing"])
def test_options_that_change_only_how_it_is_computed(
    option: str, text_file: Path, tmp_path: Path
) -> None:
    """Close to the plain run, and really on: bf16 rounds, recomputation does not."""
    ends = {}
    for value in (False, True):
        recipe = make(text_file, **{option: value}, max_steps=6, decay_steps=2)
        result = train(recipe, tmp_path / str(value))
        ends[value] = result.eval_loss
    assert ends[True] == pytest.approx(ends[False], abs=0.05)
    assert (ends[True] == ends[False]) == (option == "gradient_checkpointing")
