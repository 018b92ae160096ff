"""What the command line says to somebody who does not know it yet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
from transformers import LlamaConfig, LlamaForCausalLM

from growkit.advice.new_run import learning_rate, new_run_recipe
from growkit.cli.app import COMMANDS, build_app
from growkit.cli.main import main
from growkit.data.tokenizer import train_bpe
from growkit.training import load_recipe

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
        ("growkit train train-co", ["train-continue"]),
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


@pytest.mark.parametrize(("given", "built"), [("plan", {"plan"}), ("plna", None), ("-h", None)])
def test_a_command_is_built_alone_and_all_are_where_none_is_named(
    given: str, built: set[str] | None
) -> None:
    import typer

    assert set(typer.main.get_command(build_app(given)).commands) == (built or set(COMMANDS))


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

    def interrupted(given: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("growkit.cli.app.build_app", interrupted)
    code, _, err = growkit(*shlex.split(words))
    *said, last = err.splitlines()
    assert (code, last) == (130, "interrupted") and "\n".join(said).endswith(again)
    assert bool(said) == bool(again)
    monkeypatch.setenv("RANK", "1")
    assert growkit(*shlex.split(words))[2] == "interrupted\n"


# -- a recipe for the checkpoint at hand, and what it comes to ------------------------------------


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny grown folder with a tokenizer, and a text beside it."""
    folder = tmp_path_factory.mktemp("new-user")
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    train_bpe([], 257, folder / "source")
    tiny.grow(folder / "source", folder / "grown", ffn="x1.5")
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 600)
    return folder / "grown"


def everything(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_recipe_is_written_checked_and_trains(
    grown: Path, growkit: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = grown.with_name("text.txt")
    code, out, err = growkit("recipes", "new-run", grown, "--text", text)
    assert (code, err) == (0, "")
    assert out == "wrote recipe.yaml\nnext: edit it, then growkit train recipe.yaml --dry-run\n"
    said = Path("recipe.yaml").read_text()
    assert all(len(line) <= 100 for line in said.splitlines())
    for part in ("the model's whole context", "GPT-3", "arXiv:2308.04014", "are new since the"):
        assert part in said
    recipe = load_recipe(Path("recipe.yaml"))
    assert recipe.model.checkpoint == grown and recipe.data.files == [text]
    assert recipe.data.sequence_length == 64 and recipe.training.bf16
    assert recipe.training.learning_rate == 3e-4  # half of GPT-3's at its smallest size
    tokens = recipe.training.max_tokens
    assert tokens is not None and 0.9 * text.stat().st_size < tokens < text.stat().st_size

    before = everything(tmp_path)
    code, out, err = growkit("train", "recipe.yaml", "--dry-run")
    assert (code, err) == (0, "") and everything(tmp_path) == before
    for part in ("a new run", "1 file, 25.8 kB, about 25.80 k tokens", "memory per process"):
        assert part in out
    assert max(map(len, out.partition("- ")[0].splitlines())) <= 80
    assert out.splitlines()[-1] == "next: growkit train recipe.yaml --out checkpoints/recipe"
    code, out, err = growkit("train", "recipe.yaml", "--dry-run", "--json")
    counted = json.loads(out)
    assert counted["steps"] == recipe.total_steps and counted["out"] == "a new run"
    assert growkit("train", "recipe.yaml", "--dry-run", "--quiet") == (0, "", "")

    code, _, err = growkit("recipes", "new-run", grown)
    assert code == 2 and "--out 'recipe.yaml' exists already" in err
    assert Path("recipe.yaml").read_text() == said


def test_the_batch_follows_the_memory(grown: Path) -> None:
    text = grown.with_name("text.txt")
    batch = re.compile(r"train_batch_size: (\d+)")
    sizes = [
        int(batch.findall(new_run_recipe(grown, None, memory))[0])
        for memory in (2_000_000, 8_000_000, 64_000_000)
    ]
    assert sizes[0] < sizes[1] < sizes[2] <= 64
    assert "TOO MUCH for one device" in new_run_recipe(grown, text, 100_000)
    assert learning_rate(125_000_000) == 3e-4 and learning_rate(6_700_000_000) == 6e-5
    assert learning_rate(350_000_000) > learning_rate(500_000_000) > learning_rate(760_000_000)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ("data.sequence_length=128", "the model has positions for 64"),
        ("data.eval_fraction=0.001", "held-out text has about 26 tokens, less than one sequence"),
        ("training.report_to=[nobody]", "names the tracker 'nobody'"),
        ("data.files=[nowhere]", "nowhere"),
        ("training.decay_steps=1000000", "decay"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    change: str, sentence: str, grown: Path, growkit: Call, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(new_run_recipe(grown, grown.with_name("text.txt")))
    before = everything(tmp_path)
    code, _, err = growkit("train", tmp_path / "r.yaml", "--dry-run", "--set", change)
    assert code == 2 and sentence in err and everything(tmp_path) == before


def test_a_dry_run_from_scratch(
    growkit: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = growkit("train", "train-gda-small", "--dry-run", "--set", "tokenizer={bytes: 1}")
    assert code == 0 and "from scratch (gda)" in out and not list(tmp_path.iterdir())


def test_new_run_needs_a_checkpoint(growkit: Call) -> None:
    assert "new-run needs the checkpoint" in growkit("recipes", "new-run")[2]
    assert "takes one name" in growkit("recipes", "train-continue", "grown")[2]
