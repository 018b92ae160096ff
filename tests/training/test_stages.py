"""Runs that grow on the way: order of data, state, triggers, kills, corrupted growths."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from stage_runs import STAGES, staged_values

from growkit.cli.main import main
from growkit.core.errors import UsageError, VerificationFailed
from growkit.data.order import RunSampler
from growkit.optimizer_state.find import find_state
from growkit.training import Silent, train
from growkit.training.growth.stage_end import loss_slope, on_plateau
from growkit.training.metrics import read_metrics
from growkit.training.read_recipe import load_recipe, make_recipe
from growkit.training.recipe_stages import Plateau


def figures(out: Path) -> list[dict[str, Any]]:
    rows = read_metrics(out / "training" / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("staged") / "run"
    train(make_recipe(staged_values(text_file)), out)
    return out


def test_sizes_state_and_figures(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["num_attention_heads"] == 7 and config["intermediate_size"] == 48
    assert config["num_hidden_layers"] == 3
    lineage = json.loads((finished / "growkit.json").read_text())["lineage"]
    assert len(lineage) == 1  # and the growth of growkit.json itself
    rows = figures(finished)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert all(row["tokens"] == row["step"] * 64 for row in rows)
    assert [row["stage"] for row in rows] == sorted(row["stage"] for row in rows)
    growths = [row for row in rows if "growth" in row]
    assert [row["step"] for row in growths] == [4, 8]
    assert [row["growth"] for row in growths] == [
        {"signal_heads": "x2"}, {"ffn": "x1.5", "layers": "+1"},
    ]  # fmt: skip
    for row in growths:
        assert abs(row["loss_before"] - row["loss_after"]) < 1e-5
        assert row["parameters_before"] < row["parameters"]
    record = json.loads((finished / "growkit_training.json").read_text())
    assert record["stages"] == 3 and record["trained_tokens"] == 12 * 64
    last = find_state(finished)  # of the last stage
    assert last is not None and last.step == 12
    # The inserted layer is 4 steps old, everything else 12.
    assert {p.step for p in last.parameters.values()} == {12.0, 4.0}
    rates = {row["step"]: row["learning_rate"] for row in rows if "loss" in row}
    # A re-warm-up of 2 steps: 1/3 and 2/3 of the rate, then all of it.
    assert rates[9] == pytest.approx(1e-2 / 3) and rates[10] == pytest.approx(2e-2 / 3)
    assert rates[8] == rates[12] == 1e-2


def read_by(
    values: Any, out: Path, monkeypatch: pytest.MonkeyPatch, *, start_over: bool = False
) -> list[bytes]:
    """The sequences that training steps read, in order."""
    from growkit.training.trainer import RunTrainer

    read: list[bytes] = []
    original, sampler = RunTrainer.training_step, RunSampler.__init__

    def spy(self: Any, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        read.extend(row.numpy().tobytes() for row in inputs["input_ids"])
        return original(self, model, inputs, *rest, **options)

    def restart(self: RunSampler, **arguments: Any) -> None:
        sampler(self, **{**arguments, "steps_done": lambda: 0})

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", spy)
        if start_over:
            patch.setattr(RunSampler, "__init__", restart)
        train(make_recipe(values), out)
    return read


def test_every_sample_once_in_the_order_of_one_run(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = staged_values(text_file, [{"at": {"steps": 2}, "grow": {"ffn": "x2"}}], max_steps=5)
    staged = read_by(values, tmp_path / "staged", monkeypatch)
    assert len(set(staged)) == len(staged) == 5 * 4
    wrong = read_by(values, tmp_path / "wrong", monkeypatch, start_over=True)
    assert len(set(wrong)) < len(wrong)  # negative control: a sampler that starts over is seen
    del values["stages"]
    assert read_by(values, tmp_path / "plain", monkeypatch) == staged


def test_repeated_command_changes_nothing(finished: Path, text_file: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    result = train(make_recipe(staged_values(text_file)), finished)
    assert result.steps == 12 and result.tokens == 12 * 64
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before


def test_killed_anywhere_it_is_the_same_run(
    finished: Path, text_file: Path, tmp_path: Path
) -> None:
    """kill -9: inside both growths, between parts, and at random moments."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(staged_values(text_file)))
    stages = "training/stages"
    source = random.Random()
    wishes = [
        {"exists": f"{stages}/0/training/checkpoints/checkpoint-3"},
        {"exists": f"{stages}/1-grown.partial/growkit_optimizer/state.json"},
        {"exists": f"{stages}/1-grown"},
        {"exists": f"{stages}/2-grown.partial/model.safetensors"},
        {"seconds": source.uniform(0.2, 1.5)},
        {"exists": "training/final.partial"},
    ]
    program = [sys.executable, str(Path(__file__).with_name("stage_runs.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, str(path), str(tmp_path / "run"), json.dumps(wishes)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    killed = json.loads(done.stdout.splitlines()[-1])
    assert len(killed) >= 5 and any("1-grown.partial" in str(wish) for wish in killed)
    assert weights(tmp_path / "run") == weights(finished)
    assert figures(tmp_path / "run") == figures(finished)
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_corrupted_growth_is_refused_and_the_run_goes_on(
    finished: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(staged_values(text_file)))
    with monkeypatch.context() as patch:
        patch.setattr(
            "growkit.surgery.expand.shares", lambda weights, copies, *rest: [weights] * copies
        )
        assert main(["train", str(path), "--out", str(out), "--quiet"]) == 3
    assert not (out / "training" / "stages" / "1-grown").exists()
    assert not (out / "config.json").exists()
    assert main(["train", str(path), "--out", str(out), "--quiet"]) == 0
    assert weights(out) == weights(finished)
    assert figures(out) == figures(finished)


def test_grown_folder_that_changed_afterwards_is_refused(
    finished: Path, text_file: Path, tmp_path: Path
) -> None:
    """The loss at the first step of a stage has to be that of the end of the stage before."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    stages = out / "training" / "stages"
    for name in ("1", "2", "2-grown"):
        shutil.rmtree(stages / name)
    file = stages / "1-grown" / "model.safetensors"
    content = bytearray(file.read_bytes())
    last = np.frombuffer(content, np.float32, 400, len(content) - 1600)
    last *= 1.5
    file.write_bytes(content)
    recipe = make_recipe(staged_values(text_file))
    for _ in range(2):
        with pytest.raises(VerificationFailed, match="before growth 1 and is"):
            train(recipe, out)
    for name in ("1", "1-grown"):
        shutil.rmtree(stages / name)
    train(recipe, out)
    assert weights(out) == weights(finished)


@pytest.mark.parametrize("choice", ["reset", "reset-new"])
def test_optimizer_state_of_a_stage(choice: str, text_file: Path, tmp_path: Path) -> None:
    stages = [{"at": {"steps": 4}, "grow": {"ffn": "x2", "optimizer_state": choice}}]
    train(make_recipe(staged_values(text_file, stages, max_steps=5)), tmp_path / "run")
    folder = tmp_path / "run" / "training" / "stages" / "1" / "training" / "checkpoints"
    state = find_state(folder / "checkpoint-5")
    assert state is not None
    assert {p.step for p in state.parameters.values()} == {1.0 if choice == "reset" else 5.0}


class Listening(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_plateau(text_file: Path, tmp_path: Path) -> None:
    """A rule that any loss fulfils grows as soon as its window is full, and again after a kill."""
    rule = {"loss_per_million_tokens": 1e9, "window_tokens": 4 * 64}
    stages = [{"at": {"plateau": rule}, "grow": {"ffn": "x2"}}]
    values = staged_values(text_file, stages, logging_steps=1)
    train(make_recipe(values), tmp_path / "run")
    growth = next(row for row in figures(tmp_path / "run") if "growth" in row)
    assert growth["step"] == 5  # four losses in the window, and one older
    # Undecided again, as after a kill before the decision: the same losses, the same step.
    stage = tmp_path / "run" / "training" / "stages"
    for name in ("1", "1-grown", "0/training/checkpoints/checkpoint-5"):
        shutil.rmtree(stage / name)
    for name in ("0/stop.json", "0/growkit_training.json", "0/config.json"):
        (stage / name).unlink()
    before = weights(tmp_path / "run")
    train(make_recipe(values), tmp_path / "run")
    assert weights(tmp_path / "run") == before


def test_plateau_that_never_comes(text_file: Path, tmp_path: Path) -> None:
    rule = {"loss_per_million_tokens": 1e-9, "window_tokens": 200}
    stages = [{"at": {"plateau": rule}, "grow": {"ffn": "x2"}}]
    listening = Listening()
    values = staged_values(text_file, stages, max_steps=4, logging_steps=2)
    result = train(make_recipe(values), tmp_path / "run", reporter=listening)
    assert result.steps == 4 and any("never reached" in w for w in listening.warnings)
    stages[0]["at"]["plateau"]["latest_tokens"] = 128  # type: ignore[index]
    train(make_recipe(staged_values(text_file, stages, max_steps=4)), tmp_path / "latest")
    assert [row["step"] for row in figures(tmp_path / "latest") if "growth" in row] == [2]


def test_slope() -> None:
    rows = [{"tokens": 1000 * i, "loss": 5.0 - 2e-6 * 1000 * i} for i in range(20)]
    assert loss_slope(rows, 8000) == pytest.approx(-2.0)
    assert loss_slope(rows[:5], 8000) is None  # not yet a window
    assert loss_slope([{"tokens": 0, "eval_loss": 3.0}], 10) is None
    assert on_plateau(rows, Plateau(loss_per_million_tokens=2.1, window_tokens=8000))
    assert not on_plateau(rows, Plateau(loss_per_million_tokens=1.9, window_tokens=8000))
    rising = [{**row, "loss": -row["loss"]} for row in rows]
    assert on_plateau(rising, Plateau(loss_per_million_tokens=0.1, window_tokens=8000))


def test_by_hand(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--grow-now while the run goes on."""
    out, path = tmp_path / "run", tmp_path / "recipe.yaml"
    stages = [{"at": {"by_hand": True}, "grow": {"ffn": "x2"}}]
    path.write_text(yaml.safe_dump(staged_values(text_file, stages)))
    assert main(["train", str(path), "--out", str(out), "--grow-now"]) == 2  # no run there
    from growkit.training.trainer import RunCallback

    original = RunCallback.on_log

    def ask(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        original(self, args, state, control, **given)
        if state.global_step == 6 and "loss" in given["logs"]:
            with monkeypatch.context():
                from growkit.training.growth.stage_end import ask_for_growth

                ask_for_growth(out)

    monkeypatch.setattr(RunCallback, "on_log", ask)
    assert main(["train", str(path), "--out", str(out), "--quiet"]) == 0
    assert [row["step"] for row in figures(out) if "growth" in row] == [7]
    assert not (out / "grow-now").exists()
    assert main(["train", str(path), "--out", str(out), "--grow-now"]) == 2  # finished


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [{"at": {"steps": 4}, "grow": {"heads": "x2"}}],
            r"stages\[0\] cannot be done. A gda .* no query heads",
        ),
        (
            [STAGES[0], {"at": {"steps": 8}, "grow": {"signal_heads": "x1.3"}}],
            r"stages\[1\] cannot be done. --signal-heads x1.3 asks for 7.8",
        ),
        ([{"at": {"steps": 12}, "grow": {"ffn": "x2"}}], "before the end of the run"),
        ([STAGES[1], STAGES[0]], r"stages\[1\] grows at step 4"),
        ([{"at": {"steps": 4, "tokens": 9}, "grow": {"ffn": "x2"}}], "[Gg]ive exactly one of"),
        ([{"at": {"steps": 4}, "grow": {"fnn": "x2"}}], "unknown key 'fnn'"),
        ([{"at": {"steps": 4}, "grow": {}}], "Nothing to grow"),
        ([{**STAGES[0], "training": {"seed": 1}}], "'seed', which cannot change"),
        ([{**STAGES[0], "training": {"learning_rat": 1}}], "Did you mean 'learning_rate'"),
        ([{**STAGES[0], "training": {"learning_rate": -1}}], "learning_rate is -1"),
        ([{**STAGES[0], "warm_up": 3}], "unknown key 'warm_up'"),
    ],
)
def test_refused_before_the_first_step(
    stages: Any, message: str, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        train(make_recipe(staged_values(text_file, stages)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_increments_stay_increments(text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    values = staged_values(text_file, [])
    path.write_text(
        yaml.safe_dump(values).replace(
            "stages: []", "stages:\n- {at: {steps: 2}, grow: {layers: +1}}"
        )
    )
    assert load_recipe(path).stages[0].request().layers == "+1"


def test_training_of_a_stage(text_file: Path, tmp_path: Path) -> None:
    """New slots alone for two steps after the growth, at half the rate."""
    stage = {**STAGES[0], "training": {"train": {"new_then_all": 2}, "learning_rate": 5e-3}}
    values = staged_values(text_file, [stage], max_steps=8, logging_steps=1)
    train(make_recipe(values), tmp_path / "run")
    rows = [row for row in figures(tmp_path / "run") if "loss" in row and row["step"] > 4]
    assert all(row["learning_rate"] == pytest.approx(5e-3) for row in rows)
    frozen = [row["step"] for row in rows if row["grad_norm_old"] == 0.0]
    assert frozen == [5, 6]
