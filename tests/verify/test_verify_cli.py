"""The command: exit codes, JSON, quiet, report only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import verify_models as models

from growkit.cli import main as entry

SMALL = ["--tokens", "64", "--window", "32"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("cli")
    model = models.make_model()
    models.save(model, root / "source")
    models.save(models.grow_heads(model), root / "right")
    broken = models.grow_heads(model)
    broken.model.layers[1].self_attn.o_proj.weight.data *= 1.05
    models.save(broken, root / "wrong")
    return {path.name: str(path) for path in root.iterdir()}


def run(*arguments: str) -> int:
    return entry.main(["verify", *arguments, *SMALL])


def test_equal_checkpoints_exit_0_with_a_table(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folders["source"], folders["right"]) == 0
    out = capsys.readouterr().out
    assert "passed: source against right" in out
    for figure in ("max |d logit|", "KL(A||B)", "top-1 agreement", "perplexity", "greedy tokens"):
        assert figure in out


def test_different_checkpoints_exit_3_and_name_the_layer(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folders["source"], folders["wrong"]) == 3
    captured = capsys.readouterr()
    assert "first differs after layer 1 of B" in captured.err
    assert "Traceback" not in captured.err
    assert "failed: source against wrong" in captured.out


def test_report_only_prints_the_failure_and_exits_0(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folders["source"], folders["wrong"], "--report-only") == 0
    assert "failed" in capsys.readouterr().out


def test_json_holds_one_document_with_stable_keys(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folders["source"], folders["wrong"], "--json") == 3
    document = json.loads(capsys.readouterr().out)
    assert list(document) == [
        "schema", "status", "passed", "cause", "a", "b", "exactness", "tokens", "windows", "text",
        "tokenizer", "storage_dtype_a", "storage_dtype_b", "compute_dtype", "layers_a", "layers_b",
        "layerwise", "tolerance", "logit_rms", "logit_max", "max_difference", "mean_difference",
        "kl_mean", "kl_max", "top1_agreement", "perplexity_a", "perplexity_b",
        "generation", "half_precision", "first_differing_layer", "layers", "notes",
        "window", "verified_length", "long_window", "rows", "config", "cached", "amplification",
        "compared", "perplexity_difference",
    ]  # fmt: skip
    assert (document["passed"], document["first_differing_layer"]) == (False, 1)
    assert document["a"] == "source"
    assert [layer["within"] for layer in document["layers"]] == [True, True, False, False]

    assert run(folders["source"], folders["right"], "--json") == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_config_that_transformers_refuses_is_explained(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message of a strict config has the reason on its second line."""
    bad = shutil.copytree(folders["source"], tmp_path / "bad")
    config = {"model_type": "gda", "head_dim": 7}
    (bad / "config.json").write_text(json.dumps(config))
    assert run(str(bad), folders["right"]) == 1
    cause = capsys.readouterr().err.splitlines()[0]
    assert "cannot load" in cause and "positive even number" in cause


def test_a_class_that_fails_by_itself_is_named(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As transformers 5.24 does for every Llama 4 with towers."""

    def forward(self: Any, input_ids: Any, **options: Any) -> Any:
        return SimpleNamespace().image_outputs

    monkeypatch.setattr(type(models.make_model()), "forward", forward)
    assert run(folders["source"], folders["right"]) == 1
    cause, remedy = capsys.readouterr().err.splitlines()[-2:]
    assert "fails in its own forward pass: AttributeError" in cause and "image_outputs" in cause
    assert "another transformers than" in remedy


def test_quiet_prints_nothing_on_success(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folders["source"], folders["source"], "-q") == 0
    assert capsys.readouterr().out == ""


def test_verbose_lists_every_layer(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folders["source"], folders["right"], "-v") == 0
    out = capsys.readouterr().out
    assert "residual stream" in out
    assert "embedding" in out


def test_text_file_is_used(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("All growth is change, but not all change is growth.")
    text = ["--text", str(tmp_path / "mine.txt")]
    assert run(folders["source"], folders["right"], *text, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["text"], document["tokens"]) == ("given text", 32)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--layerwise", "maybe"], "--layerwise 'maybe'"),
        (["--compute-dtype", "int8"], "--compute-dtype 'int8'"),
        (["--tolerance", "-1"], "--tolerance -1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--text", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_wrong_options_exit_2(
    folders: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    assert run(folders["source"], folders["right"], *arguments) == 2
    assert sentence in capsys.readouterr().err


def test_not_a_checkpoint_exits_2(folders: dict[str, str], tmp_path: Path) -> None:
    assert run(folders["source"], str(tmp_path / "nowhere")) == 2
    assert run(folders["source"], str(tmp_path)) == 2


def test_transformers_prints_nothing_of_its_own(folders: dict[str, str]) -> None:
    """In a process of its own: bars and load reports would go to its stderr."""
    code = (
        "import sys; from pathlib import Path; from growkit.verification import verify_checkpoints;"
        "print(verify_checkpoints(Path(sys.argv[1]), Path(sys.argv[2]), tokens=32).status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folders["source"], folders["right"]],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("passed", "")
