"""--overwrite deletes what growkit or transformers wrote, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_checkpoints as tiny

from growkit.checkpoint.side_files import foreign_files
from growkit.cli.main import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny.make_folder(tmp_path / "source", tiny.gda_config())
    for name in ("LICENSE", "tokenizer_config.json", "modules.json"):
        (folder / name).write_text("{}")
    return folder


def grow(source: Path, out: Path, *flags: str) -> int:
    arguments = ["grow", str(source), "--layers", "+1", "--no-verify", "--out", str(out), *flags]
    return main(arguments)


def test_foreign_files_are_named_and_kept(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "thesis.tex").write_text("years of work")
    for number in range(6):
        (out / f"note-{number}.md").write_text("a")
    (out / "figures").mkdir()
    assert grow(source, out, "--overwrite") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "'figures/', 'note-0.md'" in error and "and 3 more" in error and "=all" in error
    assert (out / "thesis.tex").read_text() == "years of work" and (out / "figures").is_dir()
    assert not list(tmp_path.glob("*.partial"))
    assert grow(source, out, "--overwrite=all") == 0
    assert not (out / "thesis.tex").exists() and (out / "growkit.json").is_file()


def test_our_own_output_is_replaced(source: Path, tmp_path: Path) -> None:
    """Model code, copied side files of any name, and the same again by the long flag."""
    out = tmp_path / "out"
    assert grow(source, out) == 0
    assert (out / "modules.json").is_file() and list(out.glob("modeling_*.py"))
    assert foreign_files(out) == []
    assert grow(source, out, "--overwrite") == 0
    assert grow(source, out, "--overwrite-all") == 0
    (out / "train.py").write_text("import torch")
    (out / ".git").mkdir()
    (out / "growkit_optimizer").mkdir()
    (out / "growkit_optimizer" / "notes.txt").write_text("x")
    assert foreign_files(out) == [".git/", "growkit_optimizer/notes.txt", "train.py"]


def test_bare_flag_takes_no_value(source: Path, tmp_path: Path) -> None:
    """An option with an optional value would swallow the folder after it."""
    out = tmp_path / "out"
    assert grow(source, out) == 0
    arguments = ["grow", "--overwrite", str(source), "--layers", "+1", "--no-verify"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert main([*arguments, "--out", str(out), "--overwrite=some"]) == 2


def test_what_transformers_and_trainings_write_is_known(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(size).save_pretrained(tmp_path, max_shard_size="4KB")
    for name in ("trainer_state.json", "optimizer.pt", "rng_state_1.pth", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "recipe.yaml").write_text("a: 1")
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text("{}")
    assert foreign_files(tmp_path) == []
    (tmp_path / "checkpoint-20" / "mine.csv").write_text("1")
    (tmp_path / "model-notes.txt").write_text("1")
    (tmp_path / "training" / "thesis.tex").write_text("1")
    expected = ["checkpoint-20/mine.csv", "model-notes.txt", "training/thesis.tex"]
    assert foreign_files(tmp_path) == expected


def test_a_manifest_that_cannot_be_read_lists_nothing(tmp_path: Path) -> None:
    (tmp_path / "growkit.json").write_text(json.dumps({"copied_files": 5}))
    (tmp_path / "a.json").write_text("1")
    assert foreign_files(tmp_path) == ["a.json"]
    (tmp_path / "growkit.json").write_text("{")
    assert foreign_files(tmp_path) == ["a.json"]
