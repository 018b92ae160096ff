"""``growkit study`` on the command line: plans, reports, refusals and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_studies import keep, nodes_of, record_of, study_of, values

from growkit.cli.main import main


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study-tiny.yaml"
    path.write_text(yaml.safe_dump(values(seeds=[0, 1]), sort_keys=False))
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["study", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_plan_runs_nothing_and_leaves_the_folder_usable(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = ["--set", "arms.on.training={schedule: constant, learning_rate: [0.01, 0.02]}"]
    code, out, _ = call(capsys, recipe, "--plan", "--flops-per-second", "1e9", *rate)
    assert code == 0
    assert "scratch" in out and "0 of 10 runs are there" in out
    # small, on, signal, scratch with two seeds, and two trials.
    assert not Path("studies").exists() and "…" not in out
    assert max(map(len, out.splitlines()[:-1])) <= 80  # the last line is a sentence
    code, out, err = call(capsys, recipe, "--plan", "--json", "--arms", "scratch", "--seeds", "1")
    plan = json.loads(out)
    assert (code, err, plan["runs"], plan["finished"]) == (0, "", 1, 0)
    assert [arm["name"] for arm in plan["arms"]] == ["scratch"]
    assert plan["flops"] == plan["arms"][0]["flops"] <= plan["budget"]
    assert call(capsys, recipe, "--plan", "--quiet") == (0, "", "")


def test_a_report_of_what_is_there(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, recipe, "--report")
    assert code == 2 and "there is no study in 'studies/tiny'" in err
    out = tmp_path / "studies" / "tiny"
    nodes = nodes_of(out, study_of(seeds=[0, 1]))
    for name in ("small", "on"):
        keep(nodes, record_of(nodes, nodes.node(name, 1).key))
    (out / "study.yaml").touch()
    code, text, _ = call(capsys, recipe, "--report", "--json")
    result = json.loads(text)
    assert code == 0 and (out / "study.html").is_file() and (out / "table.md").is_file()
    assert {arm["name"]: len(arm["runs"]) for arm in result["arms"]} == {
        "on": 1,
        "signal": 0,
        "scratch": 0,
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--arms", "signl"], "'signl'"),
        (["--seeds", "5"], "--seeds names 5"),
        (["--seeds", "one"], "--seeds 'one' holds no numbers"),
        (["--devices", "gpu"], "--devices 'gpu' cannot be used"),
        (["--devices", "cpu,cpu"], "--devices 'cpu,cpu' cannot be used"),
        (["--devices", "auto,cpu"], "auto stands alone"),
        (["--set", "arms.on.bse=small"], "unknown key 'bse'"),
        (["--set", "budget.tokens=64"], "nothing left to train on"),
        (["--set", "training.warmup_steps=40"], "warmup_steps (40)"),
        (["--set", "arms.signal.grow={hiden: x2}"], "unknown key 'hiden'"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_wrong_usage_is_exit_2_and_leaves_nothing(
    recipe: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    code, out, err = call(capsys, recipe, *options)
    assert (code, out) == (2, "") and said in err
    assert not Path("studies/tiny/study.yaml").exists()


def test_a_folder_of_something_else_is_left_alone(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert call(capsys, recipe, "--out", "mine")[0] == 2
    assert call(capsys, recipe, "--out", "mine/thesis.tex")[0] == 2
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.tex"]
    code, _, err = call(capsys, "study-grwth")
    assert code == 2 and "study-growth" in err


def test_a_failed_run_is_exit_1(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from growkit.study import runner

    def broken(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        return Popen([sys.executable, "-c", "exit('no memory')"], stdout=options["stdout"],
                     stderr=subprocess.STDOUT)  # fmt: skip

    Popen = subprocess.Popen
    monkeypatch.setattr(runner.subprocess, "Popen", broken)
    code, out, err = call(capsys, recipe, "--seeds", "0", "--arms", "scratch", "--json")
    assert code == 1 and "1 runs of the study failed: no memory." in err
    assert json.loads(out)["arms"][2]["failed"] == {"0": "no memory"}


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from growkit.cli.main import main; main(['study', '--help'])\n"
        "import growkit.study.study, growkit.study.one_run\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_recipes_lists_studies_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    studies = [one for one in found if one["kind"] == "study"]
    assert studies and found[-len(studies) :] == studies
    for one in studies:
        assert one["command"].startswith("growkit study recipes/study-")
        assert one["purpose"].endswith("?")
