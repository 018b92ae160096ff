"""What a run may change while it goes on, and what it is told where it may not."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from grown_runs import grow
from safetensors.numpy import load_file
from training_runs import assert_close, cut_back, figures, make, recipe_values, weights
from transformers import AutoModelForCausalLM

from growkit.core.errors import UsageError
from growkit.core.progress import Silent
from growkit.data.order import RunSampler
from growkit.data.packing import PackedDataset
from growkit.report.figures import draw_figures
from growkit.report.page import page
from growkit.report.runs import read_runs
from growkit.training import Recipe, load_recipe, train
from growkit.training.checkpoints import step_of
from growkit.training.data_position import stored_position
from growkit.training.growth.grown import GrownOptimizer
from growkit.training.metrics import read_metrics
from growkit.training.read_recipe import make_recipe
from growkit.training.trainer import RunTrainer


class Listening(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps of WSD that decay from step 4 on, saved every 2."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(wsd(text_file), out)
    return out


def wsd(text: Path, **changes: Any) -> Recipe:
    settings = {"max_steps": 8, "save_steps": 2, "eval_steps": 8, "decay_steps": 4}
    return make(text, **{**settings, **changes})


def commands(error: pytest.ExceptionInfo[UsageError]) -> list[list[str]]:
    """The command lines that a remedy names."""
    found = re.findall(r"growkit train .*?(?= Or restart|$)", error.value.remedy)
    return [shlex.split(command.rstrip(".")) for command in found]


def follow(command: list[str], values: dict[str, Any], out: Path) -> tuple[Recipe, str]:
    """The recipe and the checkpoint of a command that a remedy names."""
    options = dict(itertools.pairwise(command))
    assert Path(options["--out"]) == out
    path = out.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    sets = [command[i + 1] for i, word in enumerate(command) if word == "--set"]
    return load_recipe(path, sets), options.get("--resume", "auto")


def test_longer_run_behind_its_decay_is_refused_with_two_ways(
    finished: Path, text_file: Path, tmp_path: Path
) -> None:
    """Both ways are tried: each gives the run that had that recipe from the beginning."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    cut_back(out, 6)
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(UsageError, match=r"checkpoint-6 lies .* jump from .* to 0\.01") as error:
        train(wsd(text_file, max_steps=14), out)
    assert sorted(path.name for path in out.rglob("*")) == before
    first, second = commands(error)
    values = recipe_values(text_file, max_steps=14, save_steps=2, eval_steps=8)
    for number, command in enumerate((first, second)):
        recipe, resume = follow(command, values, out)
        if number == 0:
            assert step_of(Path(resume)) == 4
        again, long = tmp_path / f"way-{number}" / "run", tmp_path / f"long-{number}"
        shutil.copytree(out, again)
        resume = resume.replace(str(out), str(again))
        train(recipe, again, resume=resume)
        train(recipe, long)
        assert weights(again) == weights(long)
        assert figures(again)[-1] == figures(long)[-1]


def test_no_checkpoint_before_the_decay_and_no_room_for_a_restart(
    finished: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for step in (2, 4):
        shutil.rmtree(out / "training" / "checkpoints" / f"checkpoint-{step}")
    with pytest.raises(UsageError, match=r"No checkpoint from before the decay .*takes 5 .*not 4"):
        train(wsd(text_file, max_steps=12), out)


def test_cosine_is_longer_with_a_warning_until_its_end(text_file: Path, tmp_path: Path) -> None:
    settings = {"schedule": "cosine", "save_steps": 2, "eval_steps": 8}
    out, listening = tmp_path / "run", Listening()
    train(make(text_file, max_steps=4, **settings), out)
    with pytest.raises(UsageError, match=r"behind the end .*--resume .*checkpoint-4 .*restarts"):
        train(make(text_file, max_steps=8, **settings), out)
    cut_back(out, 2)
    train(make(text_file, max_steps=8, **settings), out, reporter=listening)
    assert any("jumps to the new curve" in text for text in listening.warnings)


def test_keys_that_leave_the_samples_alone(
    finished: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another split and activation checkpointing: the ids read are equal, losses up to rounding."""
    read: list[int] = []
    original = PackedDataset.__getitem__

    def listening_item(self: PackedDataset, index: int) -> Any:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(PackedDataset, "__getitem__", listening_item)
    ids = []
    changed = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
    }
    reporter = Listening()
    for number, changes in enumerate(({}, changed)):
        out = tmp_path / str(number)
        shutil.copytree(finished, out)
        cut_back(out, 4)
        read.clear()
        train(wsd(text_file, **changes), out, reporter=reporter)
        ids.append(read[: 4 * 4])
    assert ids[0] == ids[1]
    assert any(
        "gradient_accumulation_steps 2 -> 4, training.gradient_checkpointing false -> true" in note
        for note in reporter.notes
    )
    assert_close(tmp_path / "0", tmp_path / "1", 1e-5)
    with pytest.raises(UsageError, match=r"gradient_accumulation_steps was 4 and is 8"):
        train(wsd(text_file, **changed | {"gradient_accumulation_steps": 8}), tmp_path / "1")


def test_schedule_may_change_where_the_past_does_not(finished: Path, text_file: Path) -> None:
    with pytest.raises(UsageError, match=r"decay_steps was 4\.0 and is 2\.0"):
        train(wsd(text_file, decay_steps=2), finished)
    out = finished.parent / "early"
    shutil.copytree(finished, out)
    cut_back(out, 4)
    train(wsd(text_file, decay_steps=2), out)
    train(wsd(text_file, decay_steps=2), finished.parent / "always")
    assert weights(out) == weights(finished.parent / "always")


def test_another_rate_is_a_change_point_in_a_folder_of_its_own(
    finished: Path, text_file: Path, tmp_path: Path
) -> None:
    """The refusal names the command; the new rate is the one that the weights move by."""
    out, reporter = tmp_path / "run", Listening()
    shutil.copytree(finished, out)
    cut_back(out, 4)
    with pytest.raises(UsageError, match=r"learning_rate was 0\.01 and is 1e-12") as error:
        train(wsd(text_file, learning_rate=1e-12), out)
    (command,) = commands(error)
    options = dict(itertools.pairwise(command))
    new, checkpoint = Path(options["--out"]), options["--resume"]
    assert new == tmp_path / "run-from-4" and step_of(Path(checkpoint)) == 4
    recipe = wsd(text_file, learning_rate=1e-12, weight_decay=0.0)
    train(recipe, new, resume=checkpoint, reporter=reporter)
    said = next(note for note in reporter.notes if note.startswith("Picked up"))
    assert "step 4" in said and "16 samples" in said
    assert "training.learning_rate 0.01 -> 1e-12" in said
    before = load_file(Path(checkpoint) / "model.safetensors")
    for name, value in load_file(new / "model.safetensors").items():
        assert abs(value - before[name]).max() < 1e-9, name
    rows = read_metrics(new / "training" / "metrics.jsonl")
    assert [row["step"] for row in rows if "change" in row] == [4]
    rates = {row["step"]: row["learning_rate"] for row in rows if "loss" in row}
    assert rates[4] == 0.01 and 0 < rates[6] <= 1e-12
    record = json.loads((new / "growkit_training.json").read_text())
    assert record["changes"][0]["change"]["training.learning_rate"] == [0.01, 1e-12]
    assert "change: learning_rate, weight_decay" in page(read_runs([new]), draw_figures(
        read_runs([new])), "report").replace("&#x27;", "'")  # fmt: skip
    final = weights(new)
    cut_back(new, 4)  # killed before its first checkpoint, then the same command or the plain one
    train(recipe, new)
    assert weights(new) == final
    cut_back(new, 6)
    result = train(recipe, new, resume=checkpoint)
    assert str(result.resumed_from).endswith("run-from-4/training/checkpoints/checkpoint-6")
    assert weights(new) == final
    other = str(finished / "training" / "checkpoints" / "checkpoint-6")
    with pytest.raises(UsageError, match="does not go on from"):
        train(recipe, new, resume=other)
    with pytest.raises(UsageError, match=r"keeps training\.seed.*5 and is 6.*model\.check"):
        train(wsd(text_file, seed=6), tmp_path / "seed", resume=checkpoint)
    assert not (tmp_path / "seed" / "training" / "recipe.yaml").exists()


def test_optimizer_state_beside_the_weights_is_used_or_its_absence_said(
    finished: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(finished / "training" / "checkpoints" / "checkpoint-6", checkpoint)

    def begin(folder: Path) -> tuple[Listening, int]:
        reporter = Listening()
        model = AutoModelForCausalLM.from_pretrained(folder)
        optimizer = torch.optim.AdamW(model.parameters())
        GrownOptimizer(folder, reporter).on_train_begin(
            None, SimpleNamespace(global_step=0), None, model=model, optimizer=optimizer
        )
        return reporter, len(optimizer.state)

    reporter, count = begin(checkpoint)
    assert count > 10
    assert reporter.notes == [
        f"Optimizer state beside the weights (optimizer.pt): {count} of {count} parameters "
        "continue at step 6."
    ]
    reporter, count = begin(finished)
    last = finished / "training" / "checkpoints" / "checkpoint-8"
    assert count == 0 and reporter.notes[0].endswith(f"set model.checkpoint: {last}.")
    (checkpoint / "optimizer.pt").write_bytes(b"no zip")
    reporter, count = begin(checkpoint)
    assert count == 0 and "anew, without the state beside the weights" in reporter.warnings[0]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The training sequences that a run reads, as bytes of their tokens."""
    found: list[bytes] = []
    made = RunTrainer._get_train_sampler

    class Listener(RunSampler):
        def __init__(self, own: RunSampler, dataset: Any) -> None:
            self.__dict__.update(own.__dict__)
            self.dataset = dataset

        def __iter__(self) -> Iterator[int]:
            for index in super().__iter__():
                found.append(self.dataset[index]["input_ids"].numpy().tobytes())
                yield index

    def sampler(self: RunTrainer, dataset: Any = None) -> RunSampler:
        return Listener(made(self, dataset), self.train_dataset)

    monkeypatch.setattr(RunTrainer, "_get_train_sampler", sampler)
    return found


def test_run_from_a_folder_goes_on_in_the_data(
    finished: Path, text_file: Path, tmp_path: Path, read: list[bytes]
) -> None:
    """A grown folder, another seed and batch; the samples are those of a longer run."""
    train(make(text_file, max_steps=10, decay_steps=1, eval_steps=99), tmp_path / "long")
    long = read[:40]
    grown = grow(finished, tmp_path / "grown", layers="+1")
    values = recipe_values(text_file, max_steps=1, warmup_steps=0, decay_steps=1, eval_steps=99,
                           seed=9, gradient_accumulation_steps=4)  # fmt: skip
    values["model"] = {"checkpoint": str(grown)}
    del values["tokenizer"]
    said = []
    for number, start in enumerate((None, "beginning")):
        reporter = Listening()
        values["data"] |= {} if start is None else {"start": start}
        read.clear()
        train(make_recipe(values), tmp_path / str(number), reporter=reporter)
        said.append((read[:8], [note for note in reporter.notes if "data go on" in note]))
    assert said[0][0] == long[32:40]
    assert f"behind the 32 samples that {grown} was trained on" in said[0][1][0]
    assert said[1][1] == [] and not {*said[1][0]} <= {*long[32:40]}
    position = stored_position(tmp_path / "0")
    assert position is not None and position.sources["data"].read == 40


def test_appended_text_is_a_change_point(tmp_path: Path, read: list[bytes]) -> None:
    """Refused in the folder with the command; then every sequence is read before any again."""
    texts = tmp_path / "texts"
    texts.mkdir()
    rows = [json.dumps({"text": f"row {i} of the king" * 3}) for i in range(40)]
    (texts / "a.jsonl").write_text("\n".join(rows[:3]) + "\n")
    values = recipe_values(texts, max_steps=2, warmup_steps=0, decay_steps=1, eval_steps=99)
    values["data"] |= {"eval_fraction": 0.0}
    values["data"].pop("max_eval_tokens")
    values["training"] |= {"schedule": "constant", "save_steps": 2}
    out = tmp_path / "run"
    train(make_recipe(values), out)
    before = read[:8]
    (texts / "b.jsonl").write_text("\n".join(rows[20:]) + "\n")
    values["training"] |= {"max_steps": 4}
    with pytest.raises(UsageError, match="To go on with what was appended") as error:
        train(make_recipe(values), out)
    (command,) = commands(error)
    options = dict(itertools.pairwise(command))
    new, checkpoint = Path(options["--out"]), options["--resume"]
    read.clear()
    reporter = Listening()
    train(make_recipe(values), new, resume=checkpoint, reporter=reporter)
    assert any("the new ones join what was not read yet" in note for note in reporter.notes)
    assert len({*before, *read[:8]}) == 16
    (texts / "0.jsonl").write_text(rows[0] + "\n")
    with pytest.raises(UsageError, match="by more than text that was appended"):
        train(make_recipe(values), tmp_path / "other", resume=checkpoint)
