"""torch_compile: auto tries torch's compiler on the first steps, and the trial leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import TINY_LLAMA, cut_back, figures, recipe_values, weights

from growkit.training import compiling, train
from growkit.training.read_recipe import make_recipe

CHOICE = Path("training/compiled.json")


class Compiler:
    """Stands for torch.compile: the same arithmetic; as fast as the test says."""

    def __init__(self, patch: pytest.MonkeyPatch, speed: float) -> None:
        self.calls: list[bool] = []  # of compiled code: whether gradients were wanted
        self.running = False
        timed = compiling._timed
        patch.setattr(torch, "compile", self.compile)
        patch.setattr(compiling, "_timed", lambda work: self.seconds(timed, work, speed))
        patch.setattr(compiling, "WORTH_SECONDS", 0.0)

    def compile(self, call: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def compiled(*arguments: Any, **named: Any) -> Any:
            self.running = True
            self.calls.append(torch.is_grad_enabled())
            return call(*arguments, **named)

        return compiled

    def seconds(self, timed: Any, work: Any, speed: float) -> float:
        self.running = False
        timed(work)
        return 1.0 / speed if self.running else 1.0


def run(text: Path, out: Path, resume: str = "auto", **training: Any) -> None:
    values = recipe_values(text, **training)
    values["model"]["config"] = {**TINY_LLAMA, "attention_dropout": 0.25}
    train(make_recipe(values), out, resume=resume)


def test_a_short_run_is_not_tried(text_file: Path, tmp_path: Path) -> None:
    run(text_file, tmp_path / "run")
    assert not (tmp_path / "run" / CHOICE).exists()


def test_a_trial_leaves_no_trace_and_pays(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout's numbers, gradients and everything else are those of a run that tried nothing."""
    run(text_file, tmp_path / "plain", torch_compile=False)
    compiler = Compiler(monkeypatch, speed=2.0)
    run(text_file, tmp_path / "auto")
    choice = json.loads((tmp_path / "auto" / CHOICE).read_text())
    assert choice["compiled"] and choice["step"] == 6
    assert weights(tmp_path / "auto") == weights(tmp_path / "plain")
    assert figures(tmp_path / "auto") == figures(tmp_path / "plain")
    # Four passes of the trial and two micro-batches of each of the six steps left; no evaluation.
    assert compiler.calls == [True] * (4 + 2 * 6)


def test_a_trial_that_leaves_its_gradients_is_caught(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above."""
    run(text_file, tmp_path / "plain", torch_compile=False)
    Compiler(monkeypatch, speed=2.0)
    monkeypatch.setattr(torch.nn.Module, "zero_grad", lambda *_, **__: None)
    run(text_file, tmp_path / "auto")
    assert weights(tmp_path / "auto") != weights(tmp_path / "plain")


def test_what_is_not_faster_is_left_alone(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(monkeypatch, speed=1.05)
    run(text_file, tmp_path / "run")
    assert not json.loads((tmp_path / "run" / CHOICE).read_text())["compiled"]
    assert len(compiler.calls) == 4


def test_a_continued_run_keeps_the_choice(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Compiler(monkeypatch, speed=2.0)
    out = tmp_path / "run"
    run(text_file, out)
    whole = weights(out)
    cut_back(out, 3)
    with monkeypatch.context() as patch:
        slower = Compiler(patch, speed=0.5)  # the clock would say otherwise now
        run(text_file, out)
    assert weights(out) == whole
    assert slower.calls == [True] * (2 * 6)  # from step 6 on, without a trial


def test_a_compiler_that_fails_is_said_and_done_without(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(call: Any, **options: Any) -> Any:
        def compiled(*arguments: Any, **named: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return compiled

    run(text_file, tmp_path / "plain", torch_compile=False)
    Compiler(monkeypatch, speed=2.0)
    monkeypatch.setattr(torch, "compile", fails)
    run(text_file, tmp_path / "run")
    assert not json.loads((tmp_path / "run" / CHOICE).read_text())["compiled"]
    assert weights(tmp_path / "run") == weights(tmp_path / "plain")
