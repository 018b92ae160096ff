"""lm-evaluation-harness on a local folder with local tasks; nothing is fetched."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from growkit.cli.main import main

INSTALLED = importlib.util.find_spec("lm_eval") is not None
TASK = """\
task: letter_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
"""


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_extra_the_command_says_what_to_install(folder: Path, capsys) -> None:
    assert main(["eval", str(folder), "--tasks", "hellaswag"]) == 2
    assert "growkit[eval]" in capsys.readouterr().err


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"question": f"{i} ", "choices": ["aa", "zq"], "label": i % 2} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TASK.replace("FILE", str(tmp_path / "rows.jsonl"))
    (tmp_path / "letter_choice.yaml").write_text(text)
    return tmp_path


@pytest.mark.skipif(not INSTALLED, reason="needs the eval extra")
def test_a_local_task_runs(folder: Path, tasks: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    command = ["eval", str(folder), "--tasks", "letter_choice", "--include-path", str(tasks)]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    # Every question has the same two answers and every other one each target: the model prefers
    # one of them always or nearly so.
    assert 0.25 <= report["tasks"]["letter_choice"]["acc"] <= 0.75
    assert report["texts"] == {}


@pytest.mark.skipif(not INSTALLED, reason="needs the eval extra")
def test_an_unknown_task_is_named(folder: Path, tasks: Path, capsys) -> None:
    command = ["eval", str(folder), "--tasks", "letter_choise", "--include-path", str(tasks)]
    assert main(command) == 2
    assert "letter_choice" in capsys.readouterr().err
