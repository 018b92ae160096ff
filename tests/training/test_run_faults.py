"""A disk that fails while a run writes, and signals: a sentence that says what is kept; go on."""

from __future__ import annotations

import builtins
import errno
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from process_runs import start
from training_runs import figures, make, recipe_values, weights

from growkit.cli.main import main
from growkit.core.errors import CheckpointError, GrowkitError
from growkit.core.process import stopping_signals
from growkit.training import train
from growkit.training.checkpoints import newest_whole
from growkit.training.metrics import read_metrics
from growkit.training.storage import says_what_is_kept


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(make(text_file), out)
    (out.parent / "recipe.yaml").write_text(yaml.safe_dump(make(text_file).to_dict()))
    return out


def fail_at(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let opening a file for writing fail once, where its path ends with ``name``."""
    failed: list[str] = []

    def wrong(path: Any, mode: str) -> bool:
        hit = not failed and str(path).endswith(name) and set(mode) & set("wax")
        failed.extend([str(path)] if hit else [])
        return bool(hit)

    own, own_path = builtins.open, Path.open

    def opened(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if wrong(path, mode):
            raise OSError(number, os.strerror(number), str(path))
        return own(path, mode, *rest, **options)

    def opened_path(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if wrong(path, mode):
            raise OSError(number, os.strerror(number), str(path))
        return own_path(path, mode, *rest, **options)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(Path, "open", opened_path)
    return failed


@pytest.mark.parametrize(
    ("name", "number", "kept"),
    [
        ("checkpoint-6/trainer_state.json", errno.ENOSPC, "checkpoint-3 is whole"),
        ("checkpoint-6/manifest.json", errno.EIO, "checkpoint-3 is whole"),
        ("metrics.jsonl", errno.EDQUOT, "begins again"),
        ("final.partial/growkit_training.json", errno.ENOSPC, "checkpoint-12 is whole"),
        ("tokens.bin", errno.EMFILE, "begins again"),
        ("recipe.yaml.partial", errno.EDQUOT, "begins again"),
    ],
)
def test_failed_write_is_one_sentence_and_the_command_goes_on(
    name: str, number: int, kept: str, finished: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["train", str(finished.parent / "recipe.yaml"), "--out", str(tmp_path / "run"), "-q"]
    with pytest.MonkeyPatch.context() as patch:
        failed = fail_at(name, number, patch)
        assert main(command) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert failed and name.split("/")[-1] in said and kept in said, said
    assert "Traceback" not in said and "None" not in said
    assert main(command) == 0
    assert weights(tmp_path / "run") == weights(finished)
    assert figures(tmp_path / "run") == figures(finished)


def test_libraries_that_hide_the_cause(tmp_path: Path) -> None:
    """torch says that its writer failed; the Rust libraries name a number."""
    with pytest.raises(GrowkitError, match="disk became full while"), says_what_is_kept(tmp_path):
        raise Exception("I/O error: No space left on device (os error 28)")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(GrowkitError, match="limit") as caught, says_what_is_kept(tmp_path):
            torch.save(torch.zeros(100_000), tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "No checkpoint is lost" in caught.value.remedy
    with pytest.raises(ZeroDivisionError), says_what_is_kept(tmp_path):
        raise ZeroDivisionError
    with pytest.raises(CheckpointError, match="as it was"), says_what_is_kept(tmp_path):
        raise CheckpointError("as it was")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_saves_the_step_and_the_command_goes_on(
    number: signal.Signals, text_file: Path, tmp_path: Path
) -> None:
    values = recipe_values(text_file, max_steps=30, save_steps=30, logging_steps=1, eval_steps=30)
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(values))
    command = ["train", str(path), "-q", "--out", str(out)]
    launch = start(1, command)
    (process,) = launch.processes
    while process.is_alive():
        if len(read_metrics(out / "training" / "metrics.jsonl")) >= 3:
            break
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert launch.wait() == [128 + number]
    said = launch.logs[0].read_text()
    assert f"{number.name} at step" in said and "Traceback" not in said
    newest, skipped = newest_whole(out / "training" / "checkpoints")
    assert newest is not None and not skipped
    assert main(command) == 0
    assert main([*command[:-1], str(tmp_path / "whole")]) == 0
    assert weights(out) == weights(tmp_path / "whole")
    assert figures(out) == figures(tmp_path / "whole")


def test_hangup_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stopping_signals() == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in stopping_signals()
