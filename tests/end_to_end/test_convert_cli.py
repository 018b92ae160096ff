"""``growkit convert`` and ``growkit export --fold`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from converted import convert, write_source
from family_checkpoints import family_config, write_checkpoint
from transformers import AutoModelForCausalLM

from growkit.cli.main import main


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("llama") / "a", "gqa")


def test_convert_shows_plan_proof_and_warnings(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", llama, "--to", "gda", "--out", tmp_path / "b") == 0
    shown = capsys.readouterr()
    assert "llama -> gda" in shown.out and "bit-exact" in shown.out
    assert "noise queries get no gradient in the first step" in shown.err
    manifest = json.loads((tmp_path / "b/growkit.json").read_text())
    assert manifest["request"] == {"convert": {"to": "gda"}}
    assert manifest["verification"]["status"] == "passed"
    assert run("diff", llama, tmp_path / "b") == 0
    assert "every part is what its plan says" in capsys.readouterr().out


def test_a_conversion_that_is_not_exact_is_reported_not_failed(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", llama, "--to", "mqa", "--out", tmp_path / "b", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["plan"]["exactness"] == "not-exact"
    proof = result["verification"]
    assert proof["max_difference"] > 0.01
    assert proof["perplexity_a"] > 1 and proof["perplexity_b"] > 1


@torch.inference_mode()
def greedy(folder: Path) -> list[int]:
    """Greedy tokens of plain transformers; the folder brings no code of its own."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.")
    ids = torch.arange(1, 9)[None]
    tokens: list[int] = model.generate(ids, max_new_tokens=16, do_sample=False)[0].tolist()
    return tokens


@pytest.mark.parametrize(
    ("source", "arguments", "written"),
    [
        ("gqa", ["--to", "gda", "--ratio", "2"], "mistral"),
        ("qwen2", ["--to", "wgqa", "--wgqa-weights", "column"], "qwen2"),
        ("qwen3", ["--to", "gda", "--ratio", "1", "--mirror", "0.5"], "qwen3"),
    ],
)
def test_the_whole_way_and_back_gives_the_same_tokens(
    tmp_path: Path, source: str, arguments: list[str], written: str
) -> None:
    a = write_source(tmp_path / "a", source)
    assert run("convert", a, *arguments, "--out", tmp_path / "b", "--quiet") == 0
    assert run("export", tmp_path / "b", "--fold", "--out", tmp_path / "c", "--quiet") == 0
    assert tiny.read_config(tmp_path / "c")["model_type"] == written
    assert not list((tmp_path / "c").glob("*.py"))
    assert greedy(tmp_path / "c") == greedy(a)


def test_plain_is_the_fold(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "b", "gda")
    for name, command in (("c", ["export", "--fold"]), ("d", ["convert", "--to", "plain"])):
        arguments = [command[0], tmp_path / "b", *command[1:], "--out", tmp_path / name]
        assert run(*arguments, "--quiet", "--no-verify") == 0
    one, other = (tiny.read_folder(tmp_path / name) for name in "cd")
    assert all(tiny.same_bits(one[name], other[name]) for name in one)


SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "head_dim": 8}
# What is refused -> (source, arguments, words of the message).
REFUSED: dict[str, tuple[str, list[str], str]] = {
    "unknown": ("gqa", ["--to", "gdaa"], "Did you mean"),
    "unknown merge": ("mha", ["--to", "mqa", "--merge", "men"], "mean"),
    "kv heads missing": ("gqa", ["--to", "gqa"], "Give --kv-heads N"),
    "kv heads": ("gqa", ["--to", "gqa", "--kv-heads", "3"], "Numbers that fit: 1, 2, 4"),
    "ratio": ("gqa", ["--to", "gda", "--ratio", "3"], "that fit: 1, 2"),
    "mirror of a group": ("gqa", ["--to", "gda", "--ratio", "2", "--mirror", "0.5"], "--ratio 1"),
    "mirror 1": ("gqa", ["--to", "gda", "--mirror", "1"], "below 1"),
    "rank missing": ("gqa", ["--to", "shared_diff"], "Give --rank N"),
    "rank": ("gqa", ["--to", "shared_diff", "--rank", "9"], "from 1 to 8"),
    "pairs": ("mqa", ["--to", "diff_v1"], "make no pairs"),
    "kernel": ("gqa", ["--to", "sas", "--kernel", "2"], "kernels odd"),
    "features": ("gqa", ["--to", "sas", "--simulated-head-dim", "6"], "from 8 on"),
    "row weights": ("qwen2", ["--to", "wgqa", "--wgqa-weights", "row"], "scalar, column"),
    "windows": ("mistral windows", ["--to", "gda"], "windows"),
    "multipliers": ("granite", ["--to", "gda"], "granite"),
    "other families": ("gemma2", ["--to", "diff_v2"], "Families that can"),
    "fold an ordinary model": ("gqa", ["--to", "plain"], "ordinary attention already"),
    "fold a norm": ("gda", ["--to", "plain"], "sub_layer_norm"),
    "fold a gate": ("diff_v2", ["--to", "plain"], "lambda depends on the token"),
    "fold sas": ("sas", ["--to", "plain"], "ReLU"),
}


def refused_source(path: Path, name: str, llama: Path) -> Path:
    if name == "gda":
        config = tiny.gda_config(4, 2, 2, own=False, **SIZES, sub_layer_norm=True)
        return tiny.make_folder(path, config)
    if name in ("diff_v2", "sas"):
        convert(llama, path, name)
        return path
    if name in ("mistral windows", "granite", "gemma2"):
        return write_checkpoint(path, family_config(name.split()[0], num_hidden_layers=2))
    return write_source(path, name)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_would_fit_and_leave_nothing(
    llama: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, arguments, words = REFUSED[name]
    folder = refused_source(tmp_path / "a", source, llama)
    assert run("convert", folder, *arguments, "--out", tmp_path / "b") == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_an_existing_checkpoint_is_kept(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "b", "mha")
    before = (tmp_path / "b/config.json").read_bytes()
    assert run("convert", llama, "--to", "mqa", "--out", tmp_path / "b", "--quiet") == 2
    assert run("export", tmp_path / "b", "--out", tmp_path / "c", "--quiet") == 2
    assert (tmp_path / "b/config.json").read_bytes() == before
