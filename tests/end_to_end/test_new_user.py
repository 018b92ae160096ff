"""What the command line says to somebody who does not know it yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from growkit.cli.app import build_app
from growkit.cli.main import main

Said = tuple[int, str, str]
Call = Callable[..., Said]


@pytest.fixture
def growkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setenv("COLUMNS", "80")

    def call(*words: object) -> Said:
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


# -- what cannot be run ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("train gda-signal-x2", "'gda-signal-x2' is a grow recipe, not a train recipe."),
        ("train gda-signal-x2", "growkit grow CKPT --recipe gda-signal-x2 --out GROWN"),
        ("train study-small", "Run it with: growkit study study-small --out STUDY"),
        ("study train-continue", "Run it with: growkit train train-continue --out RUN"),
        ("grow ckpt --out out --recipe train-continue", "is a train recipe, not a grow recipe."),
    ],
)
def test_a_recipe_of_another_kind_says_what_runs_it(
    words: str, sentence: str, growkit: Call
) -> None:
    code, out, err = growkit(*words.split())
    assert code == 2 and out == "" and sentence in err


@pytest.mark.parametrize(
    "override, meant",
    [
        ("training.lr=1e-4", "'learning_rate'"),
        ("training.epochs=3", "'max_steps' (steps count here, not epochs)"),
        ("training.grad_accum=2", "'gradient_accumulation_steps'"),
        ("data.max_length=2", "'sequence_length'"),
        ("training.seq-len=2", "'data.sequence_length'"),
        ("lr=1", "'training.learning_rate'"),
        ("training.learning_rat=1", "'learning_rate'"),
    ],
)
def test_an_override_is_named_and_the_fields_other_spellings_are_known(
    override: str, meant: str, growkit: Call
) -> None:
    code, _, err = growkit("train", "train-continue", "--set", override)
    assert code == 2 and f"error: --set {override}: unknown key" in err
    assert f"Did you mean {meant}? Valid keys" in err and "line" not in err.split("Valid")[0]


def test_an_override_of_a_study_is_named(growkit: Call) -> None:
    code, _, err = growkit("study", "study-small", "--set", "training.wd=0")
    assert code == 2 and "--set training.wd=0: training has 'wd'" in err
    assert "Did you mean 'weight_decay'?" in err


def test_a_key_of_the_file_keeps_its_line(growkit: Call, tmp_path: Any) -> None:
    """Negative control: what no override gave is a line of the file."""
    (tmp_path / "r.yaml").write_text("model: {checkpoint: a}\ntraining:\n  lr: 3\n")
    _, _, err = growkit("train", tmp_path / "r.yaml", "--set", "training.seed=1")
    assert "r.yaml line 3: unknown key 'lr'" in err and "'learning_rate'" in err


# -- completion, help, version --------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, whole",
    [
        ("growkit train train-c", ["train-continue"]),
        ("growkit train gda", []),
        ("growkit study study-sm", ["study-small"]),
        ("growkit recipes gda-", ["gda-signal-x2"]),
        ("growkit train x --resume ne", ["never"]),
        ("growkit grow ckpt --recipe gda", ["gda-signal-x2"]),
        ("growkit plan ckpt --new-heads ze", ["zero"]),
        ("growkit plan ckpt --depth-method so", ["solar"]),
        ("growkit convert ckpt --to shared", ["shared_diff"]),
    ],
)
def test_completion_in_the_shell(words: str, whole: list[str]) -> None:
    import typer
    from typer._completion_classes import BashComplete

    *before, last = words.split()[1:]
    command = typer.main.get_command(build_app())
    shell = BashComplete(command, {}, "growkit", "_GROWKIT_COMPLETE")
    assert [item.value for item in shell.get_completions(before, last)] == whole


def test_help_and_version(growkit: Call) -> None:
    assert growkit("help")[1] == growkit("--help")[1]
    assert growkit("help", "train")[1] == growkit("train", "--help")[1]
    assert growkit("-V")[1] == growkit("--version")[1]


# -- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, again",
    [
        (
            "train train-continue --out run --overwrite --resume never --set a.b=1",
            "to continue from the last checkpoint: growkit train train-continue --out run "
            "--set a.b=1",
        ),
        ("study study-small --workers 2", "growkit study study-small --workers 2"),
        (
            "grow 'a b' --ffn x2 --out c --overwrite",
            "nothing was written; to begin again: growkit grow 'a b' --ffn x2 --out c --overwrite",
        ),
        ("inspect a", ""),
    ],
)
def test_ctrl_c_says_how_to_resume(
    words: str, again: str, growkit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("growkit.cli.app.build_app", interrupted)
    code, _, err = growkit(*shlex.split(words))
    *said, last = err.splitlines()
    assert (code, last) == (130, "interrupted") and "\n".join(said).endswith(again)
    assert bool(said) == bool(again)
    monkeypatch.setenv("RANK", "1")
    assert growkit(*shlex.split(words))[2] == "interrupted\n"
