"""Other people's tools on a local folder: lm-evaluation-harness with local tasks, and transformers'
pipeline; nothing is fetched."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import grow, llama_config, make_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import growkit.modeling  # noqa: F401  (the source has no code of its own)
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


def test_the_pipeline_of_transformers_takes_a_grown_folder(folder: Path, tmp_path: Path) -> None:
    """And writes what the source writes."""
    grow(folder, tmp_path / "grown", signal_heads="x2", layers="+1", ffn="x2")
    grown = str(tmp_path / "grown")
    write = pipeline("text-generation", model=grown, trust_remote_code=True, device="cpu")
    text = "To be, or not"
    (found,) = write(text, max_new_tokens=12, do_sample=False, return_full_text=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
    assert found["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(set(expected[len(ids[0]) :].tolist())) > 1


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
    assert set(report["tasks"]["letter_choice"]) == {"samples", "acc"}
    assert report["texts"] == {}


@pytest.mark.skipif(not INSTALLED, reason="needs the eval extra")
def test_tasks_made_of_a_text_run(folder: Path, tmp_path: Path, text, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    last_word = Path(__file__).parents[2] / "benchmarks" / "last_word.py"
    (tmp_path / "plays.txt").write_text(text)
    options = [str(tmp_path / "plays.txt"), "--out", str(tmp_path / "tasks"), "--limit", "4"]
    subprocess.run([sys.executable, str(last_word), *options], check=True)
    names = ["last_word_plays", "last_word_choice_plays"]
    command = ["eval", str(folder), "--tasks", ",".join(names), "--json"]
    assert main([*command, "--include-path", str(tmp_path / "tasks")]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert set(tasks) == set(names)
    assert tasks["last_word_plays"]["samples"] == 4
    assert tasks["last_word_plays"]["perplexity"] > 1
    assert 0 <= tasks["last_word_choice_plays"]["acc"] <= 1


@pytest.mark.skipif(not INSTALLED, reason="needs the eval extra")
def test_an_unknown_task_is_named(folder: Path, tasks: Path, capsys) -> None:
    command = ["eval", str(folder), "--tasks", "letter_choise", "--include-path", str(tasks)]
    assert main(command) == 2
    assert "letter_choice" in capsys.readouterr().err


LIGHTEVAL_TASK = """\
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc


def question(line, task_name):
    return Doc(task_name=task_name, query=line["question"], choices=line["choices"], gold_index=0)


TASKS_TABLE = [
    LightevalTaskConfig(
        name="letters",
        prompt_function=question,
        hf_repo="FOLDER",
        hf_subset="default",
        hf_avail_splits=["train"],
        evaluation_splits=["train"],
        metrics=[Metrics.loglikelihood_acc],
    )
]
"""


@pytest.mark.skipif(shutil.which("lighteval") is None, reason="LightEval is not installed")
def test_lighteval_takes_a_grown_ordinary_folder(folder: Path, tmp_path: Path) -> None:
    """In an environment of its own, found by PATH: its program on a local task."""
    source = make_folder(tmp_path / "a", llama_config(4, 2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, source)
    grow(source, tmp_path / "grown", layers="+1", ffn="x2")
    (tmp_path / "data").mkdir()
    row = json.dumps({"question": "To be or not to", "choices": [" be", " see"]})
    (tmp_path / "data" / "letters.jsonl").write_text(row + "\n")
    task = tmp_path / "letters_task.py"
    task.write_text(LIGHTEVAL_TASK.replace("FOLDER", str(tmp_path / "data")))
    model = f"model_name={tmp_path / 'grown'},batch_size=1"
    command = ["lighteval", "accelerate", model, "letters", "--custom-tasks", str(task)]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert list((tmp_path / "out").rglob("results_*.json")), done.stdout + done.stderr
