"""A run that was stopped anywhere and resumed is the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from grown_runs import continue_recipe, grow, make_source
from process_runs import run, start
from training_runs import TINY_GDA, cut_back, figures, make, recipe_values, weights
from transformers import Trainer

from growkit.core.errors import CheckpointError, UsageError
from growkit.training import Recipe, train
from growkit.training.checkpoints import damage, list_checkpoints, newest_whole, publish
from growkit.training.metrics import read_metrics
from growkit.training.read_recipe import make_recipe


@pytest.fixture(scope="module")
def recipe(text_file: Path) -> Recipe:
    return make(text_file)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(recipe, out)
    return out


@pytest.fixture(scope="module")
def grown(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = make_source(text_file, tmp_path_factory.mktemp("source") / "base")
    return grow(source, tmp_path_factory.mktemp("grown") / "grown", hidden="x2", signal_heads="x2")


@pytest.mark.parametrize("step", [0, 3, 6, 9, 12])
def test_resumed_run_equals_the_uninterrupted_one(
    step: int, recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    cut_back(out, step)
    result = train(recipe, out)
    assert (result.resumed_from is None) == (step == 0)
    assert weights(out) == weights(finished)
    assert figures(out) == figures(finished)


@pytest.mark.parametrize(
    "choices",
    [
        {"optimizer": "muon", "train": {"new_then_all": 4}, "old_warmup_steps": 2},
        {"old_learning_rate_multiplier": 0.3, "new_warmup_steps": 4, "average_checkpoints": 2},
        {"train": "new", "bf16": True, "restarts": [5], "restart_warmup_steps": 1},
    ],
    ids=["muon-new-then-all", "multipliers-average", "new-only-wsd-restart"],
)
def test_resumed_run_of_a_grown_model_equals_the_uninterrupted_one(
    choices: dict[str, object], grown: Path, text_file: Path, tmp_path: Path
) -> None:
    """Stopped before, at and after the step where the choice changes what happens."""
    settings = {"max_steps": 8, "save_steps": 2, "schedule": "wsd", "decay_steps": 2}
    recipe = continue_recipe(text_file, grown, **settings, **choices)
    train(recipe, tmp_path / "whole")
    for step in (2, 4, 6):
        out = tmp_path / f"cut-{step}"
        shutil.copytree(tmp_path / "whole", out)
        cut_back(out, step)
        assert str(train(recipe, out).resumed_from).endswith(f"checkpoint-{step}")
        assert weights(out) == weights(tmp_path / "whole")
        assert figures(out) == figures(tmp_path / "whole")
    optimizer = next((tmp_path / "whole").rglob("checkpoint-6/optimizer.pt"))
    cut_back(out, 6)
    fresh = torch.load(optimizer, weights_only=True)
    fresh["state"] = {}
    damaged = next(out.rglob("checkpoint-6/optimizer.pt"))
    torch.save(fresh, damaged)
    manifest = json.loads((damaged.parent / "manifest.json").read_text())
    manifest["format"] = 1
    del manifest["xxh3"]  # damage that checksums would find
    manifest["files"]["optimizer.pt"] = damaged.stat().st_size
    (damaged.parent / "manifest.json").write_text(json.dumps(manifest))
    train(recipe, out)
    assert weights(out) != weights(tmp_path / "whole")  # negative control


def test_another_order_of_samples_is_noticed(
    recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a sampler that starts over after a resume gives other weights."""
    from growkit.data.order import RunSampler

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    cut_back(out, 6)
    original = RunSampler.__init__

    def restart(self: RunSampler, **arguments: object) -> None:
        original(self, **{**arguments, "steps_done": lambda: 0})  # type: ignore[arg-type]

    monkeypatch.setattr(RunSampler, "__init__", restart)
    train(recipe, out)
    assert weights(out) != weights(finished)


@pytest.mark.parametrize("restored", [True, False])
def test_dropout_continues_with_its_own_random_numbers(
    restored: bool, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second case is the negative control: without our restore, dropout differs."""
    from growkit.training.trainer import RunTrainer

    values = recipe_values(text_file, max_steps=6, decay_steps=2, save_total_limit=9)
    values["model"]["config"] = {
        "model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64,
        "resid_pdrop": 0.5,
    }  # fmt: skip
    recipe = make_recipe(values)
    train(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut_back(tmp_path / "cut", 3)
    if not restored:
        monkeypatch.setattr(RunTrainer, "get_batch_samples", Trainer.get_batch_samples)
    train(recipe, tmp_path / "cut")
    assert (weights(tmp_path / "cut") == weights(tmp_path / "whole")) == restored


@pytest.mark.parametrize("workers", [0, 2])
def test_run_killed_at_any_moment_goes_on(workers: int, text_file: Path, tmp_path: Path) -> None:
    """kill -9 of a real process, wherever it happens to be; then the same command.

    With and without data loading workers; the data are read almost twice, so that
    an epoch ends in the middle of the run.
    """
    values = recipe_values(
        text_file, save_steps=4, max_steps=40, save_total_limit=2,
        per_device_train_batch_size=4, dataloader_num_workers=workers,
    )  # fmt: skip
    values["model"]["config"] = dict(TINY_GDA)
    values["data"]["sequence_length"] = 64
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    killed = tmp_path / "killed"
    command = ["train", str(path), "-q", "--out", str(killed)]
    metrics = killed / "training" / "metrics.jsonl"
    for step in sorted(random.sample(range(5, 36), 2)):
        launch = start(1, command)
        (process,) = launch.processes
        while process.is_alive():
            rows = read_metrics(metrics)
            if rows and rows[-1]["step"] >= step:
                break
            time.sleep(0.01)  # reading the rows takes the run's own time
        assert process.is_alive(), "the run ended before it could be killed"
        process.kill()
        assert launch.wait() == [-9]
        assert not (killed / "config.json").exists()
    run(1, command)
    train(make_recipe(values), tmp_path / "whole")
    record = json.loads((killed / "growkit_training.json").read_text())
    assert 1.5 < record["data"]["data"]["epochs"] < 1.9
    assert weights(killed) == weights(tmp_path / "whole")
    assert figures(killed) == figures(tmp_path / "whole")
    assert not list(killed.rglob("*.partial"))


PARTS = [
    "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "running_loss.json", "manifest.json",
]  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_damaged_newest_checkpoint_is_skipped(
    name: str, how: str, recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    cut_back(out, 6)
    folder = out / "training" / "checkpoints"
    victim = folder / "checkpoint-6" / name
    if how == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-7])
    newest, skipped = newest_whole(folder)
    assert newest == folder / "checkpoint-3"
    assert [path.name for path, _ in skipped] == ["checkpoint-6"]
    assert name in skipped[0][1]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_checkpoint_that_never_had_its_state_is_no_checkpoint(
    name: str, finished: Path, tmp_path: Path
) -> None:
    """Also when its manifest agrees with what is there."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    newest = list_checkpoints(out / "training" / "checkpoints")[-1]
    (newest / name).unlink()
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["files"][name]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert damage(newest) == f"{name} was never in it"
    with pytest.raises(CheckpointError, match=f"{name} was not written"):
        publish(newest, tmp_path / "checkpoint-12", 12)


def test_run_says_that_it_skips_and_ends_the_same(
    recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    from growkit.training import Silent

    class Listening(Silent):
        def __init__(self) -> None:
            self.warnings: list[str] = []

        def warn(self, text: str) -> None:
            self.warnings.append(text)

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    cut_back(out, 6)
    (out / "training" / "checkpoints" / "checkpoint-6" / "optimizer.pt").unlink()
    reporter = Listening()
    result = train(recipe, out, reporter=reporter)
    assert result.resumed_from is not None and result.resumed_from.endswith("checkpoint-3")
    assert any("checkpoint-6" in w and "optimizer.pt" in w for w in reporter.warnings)
    assert weights(out) == weights(finished)
    assert damage(out / "training" / "checkpoints" / "checkpoint-6") is None


def test_resume_from_a_named_checkpoint(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    cut_back(out, 9)
    chosen = out / "training" / "checkpoints" / "checkpoint-3"
    result = train(recipe, out, resume=str(chosen))
    assert result.resumed_from == str(chosen)
    assert weights(out) == weights(finished)
    (chosen / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is missing"):
        train(recipe, out, resume=str(chosen))


def test_finished_run_is_left_alone(recipe: Recipe, finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    result = train(recipe, finished)
    assert result.steps == 12
    assert (
        result.to_dict()["eval_loss"]
        == json.loads((finished / "growkit_training.json").read_text())["eval_loss"]
    )
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}


def test_longer_wsd_run_extends_the_stable_phase(text_file: Path, tmp_path: Path) -> None:
    """A stable-phase checkpoint that goes on with more steps is the run that was always long."""
    short, long = make(text_file, max_steps=8), make(text_file, max_steps=12)
    train(short, tmp_path / "extended")
    cut_back(tmp_path / "extended", 3)
    train(long, tmp_path / "extended")
    train(long, tmp_path / "long")
    assert weights(tmp_path / "extended") == weights(tmp_path / "long")


def test_run_of_another_recipe_is_refused(
    recipe: Recipe, finished: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"training.learning_rate was 0.01 and is 0.02"):
        train(make(text_file, learning_rate=2e-2), finished)
    with pytest.raises(UsageError, match="holds a run already"):
        train(recipe, finished, resume="never")


def test_recipe_refused_before_its_first_step_can_be_corrected(
    text_file: Path, tmp_path: Path
) -> None:
    values = recipe_values(text_file, max_steps=3, warmup_steps=0, decay_steps=1)
    values["data"] |= {"sequence_length": 65, "max_eval_tokens": 400}
    with pytest.raises(UsageError, match="sequence_length is 65"):
        train(make_recipe(values), tmp_path / "run")
    values["data"]["sequence_length"] = 16
    values["tokenizer"] = {"train_bpe": 270}
    assert train(make_recipe(values), tmp_path / "run").steps == 3
    values["data"]["sequence_length"] = 32
    with pytest.raises(UsageError, match="holds a run of another recipe"):
        train(make_recipe(values), tmp_path / "run")


def test_changed_data_is_refused(text_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    shutil.copyfile(text_file, text)
    train(make(text, max_steps=3, warmup_steps=0, decay_steps=1), tmp_path / "run")
    text.write_text(text.read_text() + "more\n")
    with pytest.raises(UsageError, match="data files changed"):
        train(make(text, max_steps=6, warmup_steps=0, decay_steps=1), tmp_path / "run")


def test_threads_are_not_changed(recipe: Recipe, finished: Path) -> None:
    before = torch.get_num_threads()
    train(recipe, finished)
    assert torch.get_num_threads() == before


def test_overwrite_begins_anew_and_keeps_the_old_model_until_the_end(
    recipe: Recipe, finished: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from growkit.training import models

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "training" / "notes.txt").write_text("written by hand")
    old = weights(out)
    other = make(text_file, seed=6)

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("stopped before publishing")

    with monkeypatch.context() as patch:
        patch.setattr(models, "publish_model", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            train(other, out, overwrite=True)
    assert weights(out) == old and (out / "config.json").is_file()
    result = train(other, out)
    assert result.resumed_from is not None and weights(out) != old
    assert train(recipe, out, overwrite=True).resumed_from is None
    assert weights(out) == old
    assert (out / "training" / "notes.txt").is_file()
