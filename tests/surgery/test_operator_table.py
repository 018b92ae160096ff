"""An operator is one file and one row: everything else is made of the row."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_checkpoints as tiny

from growkit.cli.main import main
from growkit.core.errors import UsageError
from growkit.surgery import operators
from growkit.surgery.operators import OPERATORS, OperatorRow, Option, all_options
from growkit.surgery.operators.ffn import Ffn
from growkit.surgery.request import GrowthRequest

ROW = OperatorRow(
    key="toy_words",
    file="toy",
    stage=3,
    help="Words that nobody says.",
    axis="vocab",
    label="toy words",
    options=(Option(key="toy_manner", values=("loud", "soft"), help="How words are said."),),
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A row in the table and a file of the folder, and a command line that is built anew."""
    file: Any = ModuleType("growkit.surgery.operators.toy")
    file.make = lambda row, amount, request: Ffn(amount)
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setitem(OPERATORS, ROW.key, ROW)
    for name in ("growth_options", "plan", "grow"):
        monkeypatch.delitem(sys.modules, f"growkit.cli.{name}", raising=False)
    yield
    for name in ("growth_options", "plan", "grow"):
        sys.modules.pop(f"growkit.cli.{name}", None)


@pytest.mark.usefixtures("toy")
def test_a_row_is_all_that_an_operator_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tiny.make_folder(tmp_path / "a", tiny.llama_config()))
    for command in ("plan", "grow"):
        assert main([command, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "--toy-words" in text and "Words that nobody says." in text
        assert "--toy-manner" in text and "How words are said." in text
    assert main(["inspect", source, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "--toy-words" in report["can_grow"]
    assert report["axes"]["vocab"]["label"] == "toy words"

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("grow: {toy_words: 24, toy_manner: soft}")
    for flags in (["--toy-words", "24"], ["--recipe", str(recipe)]):
        assert main(["plan", source, *flags, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["axes"]["ffn"]["after"] == 24 and len(report["operators"]) == 1
    assert main(["plan", source, "--toy-words", "24", "--toy-manner", "shrill"]) == 2
    assert "Valid values: loud, soft." in " ".join(capsys.readouterr().err.split())

    out = str(tmp_path / "b")
    assert main(["grow", source, "--recipe", str(recipe), "-o", out, "--no-verify", "-q"]) == 0
    manifest = json.loads((tmp_path / "b" / "growkit.json").read_text())
    assert manifest["request"] == {"toy_words": "24", "toy_manner": "soft"}
    assert main(["diff", source, out, "--json"]) == 0  # the recorded request is read again
    assert json.loads(capsys.readouterr().out)["as_grown"]


def test_without_the_row_nothing_knows_it() -> None:
    with pytest.raises(UsageError, match="unknown key 'toy_words'"):
        GrowthRequest.from_mapping({"toy_words": "x2"})


def test_every_row_is_a_field_of_the_request_and_the_reverse() -> None:
    """The request of Python names what the table has, with the kinds of values it has."""
    options = {option.key: option for option in all_options()}
    assert set(options) == {field.name for field in fields(GrowthRequest)}
    for field in fields(GrowthRequest):
        option = options[field.name]
        assert option.kind is str or field.default is None or type(field.default) is option.kind
        assert not option.values or field.default is None or field.default in option.values


def test_numbers_are_as_good_as_text() -> None:
    asked = GrowthRequest(layers=6, heads="8")
    assert [step.amount.absolute for step in asked.operators()] == [8, 6]
    assert asked.to_dict() == {"layers": "6", "heads": "8"} == replace(asked, layers="6").to_dict()


def test_the_table_imports_no_arrays() -> None:
    """The table is plain data: ``growkit --help`` reads it, and has to answer at once."""
    heavy = {"growkit.surgery.effect", "growkit.families"}
    code = f"import sys, {operators.__name__}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
