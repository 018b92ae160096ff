"""``growkit refresh``: a folder of growkit 0.1.0 loads and generates with today's transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_modeling_gda import greedy, tokens
from test_modeling_gda import make as gda_model
from without_growkit import run_without_growkit

from growkit.cli.main import main
from growkit.core.errors import UsageError
from growkit.model_code import renew as refresh
from growkit.model_code.exported import HEADER, code_files
from growkit.model_code.renew import WORK, refresh_code
from growkit.variants.shared.layer_keywords import LAYERS_WRITE_EVERY_CACHE

# What 0.1.0 wrote into a folder of model_type gda, file by file.
OLD = Path(__file__).parents[1] / "data" / "gda_code_0.1.0.json"
USER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
made = []
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.tensor(%s)
    try:
        made.append(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
    except Exception as error:
        made.append(str(error))
print("REPORT" + json.dumps(made))
"""


def old_folder(folder: Path) -> Path:
    gda_model().save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    for name, text in json.loads(OLD.read_text("utf-8")).items():
        (folder / name).write_text(text, "utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_of_0_1_0_generates_after_refresh(tmp_path: Path) -> None:
    before, after = (old_folder(tmp_path / name) for name in ("before", "after"))
    kept = {n: data for n, data in contents(after).items() if not n.endswith(".py")}
    assert main(["refresh", str(after), "--quiet"]) == 0
    now = contents(after)
    assert now.items() >= kept.items(), "weights and config are untouched"
    assert set(now) == {*kept, *code_files("gda")}
    assert all(now[name].decode("utf-8").startswith(HEADER) for name in code_files("gda"))
    script = USER % tokens().tolist()
    stdout = run_without_growkit(script, before, after, cache=tmp_path)
    old, new = json.loads(stdout.split("REPORT", 1)[1])
    expected = greedy(gda_model(), tokens()).tolist()
    assert new == expected
    if LAYERS_WRITE_EVERY_CACHE:
        assert "Continuous batching needs one attention call" in old
    else:
        assert old == expected


def test_what_needs_nothing_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gda_model().save_pretrained(tmp_path)
    stats = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert main(["refresh", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stats


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "gda", "auto_map": {"AutoModel": "modeling_evil.Model"}},
        {"model_type": ["gda"]},
    ],
)
def test_folders_of_others_are_refused(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="not written by growkit"):
        refresh_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("files", [0, 1, 7])
def test_a_failure_puts_the_old_code_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    folder = old_folder(tmp_path / "folder")
    (folder / WORK).mkdir()  # left over from a kill
    (folder / "gda.py").unlink()
    before = contents_of_files(folder)
    real, count = os.replace, iter(range(1000))

    def failing(source: Path, target: Path) -> None:
        if Path(source).parent.name == "new" and next(count) == files:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(refresh.os, "replace", failing)
    assert main(["refresh", str(folder)]) == 1
    assert contents_of_files(folder) == before
    monkeypatch.undo()
    assert set(refresh_code(folder).written) == set(code_files("gda"))
    assert not (folder / WORK).exists() and refresh_code(folder).written == []


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
