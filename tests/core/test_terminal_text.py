"""Text from files and names has no power over the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from tiny_checkpoints import llama_config, make_folder, write_folder

from growkit.cli.main import main
from growkit.cli.output import Output
from growkit.core.printed_text import printable

HOSTILE = (
    "a[/x][bold red]b[link=http://x]:smile:\x1b[2J\x9b1m\u202eevil\u2066\r\x08\nerror: z\udc80"
)
OBEYED = [*"\x1b\x9b\u202e\u2066\r\x08", "\nerror", "\udc80"]


def assert_literal(shown: str, *, whole: bool = True) -> None:
    assert not any(sign in shown for sign in OBEYED)
    joined = "".join(shown.split())
    if whole:
        assert "a[/x][boldred]b[link=http://x]:smile:" in joined
        assert r"\x1b[2J\x9b1m\u202eevil\u2066\r\x08\nerror:z\udc80" in joined


def test_ordinary_text_is_unchanged_and_the_rest_is_spelled_out() -> None:
    for text in ("model.layers.0.weight", "C:\\new\\table", "größer 模型 é"):
        assert printable(text) == text
    assert_literal(printable(HOSTILE))
    assert printable(printable(HOSTILE)) == printable(HOSTILE)
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert printable("\ufeff\u200b\x00") == "\\ufeff\\u200b\\x00"


def test_everything_that_output_prints_is_literal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    output = Output()
    table = Table(title=f"title {HOSTILE.replace(chr(10), ' ')}")
    table.add_column("heading [/x]")
    table.add_row(HOSTILE.replace("\n", " "))
    table.add_row(Text("as Text \x1b[2J"))
    output.show(HOSTILE, table)
    output.note(HOSTILE)
    output.warn(HOSTILE)
    captured = capsys.readouterr()
    assert captured.out.count("a[/x][bold red]b[link=http://x]:smile:\\x1b[2J") == 3
    assert "heading [/x]" in captured.out and "as Text \\x1b[2J" in captured.out
    assert_literal(captured.out)
    assert captured.err.count("[bold red]") == 2 and captured.err.count("warning: ") == 1
    assert_literal(captured.err)


def test_progress_descriptions_and_figures_are_literal(monkeypatch: pytest.MonkeyPatch) -> None:
    from growkit.cli.output import LiteralConsole

    output = Output()
    terminal = io.StringIO()
    output.stderr = LiteralConsole(file=terminal, force_terminal=True, width=400, color_system=None)
    with output.progress(HOSTILE, 10) as bar:
        bar.describe("second " + HOSTILE)
        bar.figures({HOSTILE: HOSTILE})
        bar.advance(10)
    shown = terminal.getvalue()
    assert "second a[/x]" in shown and "\x1b[2J" not in shown and "\u202e" not in shown


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint whose manifest tells tales."""
    folder = make_folder(tmp_path / "[/x] ck\x1b[2Jpt", llama_config())
    manifest = {"parent": {"name": "[/x]\x1b[2J\nwarning: all is well"}, "lineage": ["[/y]"]}
    (folder / "growkit.json").write_text(json.dumps(manifest))
    return folder


def test_commands_on_hostile_names_end_in_order(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "[/x]\x1b[2J"
    runs = [
        ["inspect", str(source)],
        ["plan", str(source), "--layers", "+1"],
        ["grow", str(source), "--layers", "+1", "--no-verify", "--out", str(out)],
        ["diff", str(source), str(out)],
        ["inspect", str(out)],
        ["recipes"],
    ]
    for arguments in runs:
        assert main(arguments) == 0, arguments
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err
    assert (out / "config.json").is_file()


def test_errors_are_literal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["inspect", HOSTILE[:-1]],
        ["inspect", "--" + HOSTILE[:-1]],
        [HOSTILE[:-1]],
        ["plan", str(tmp_path), "--recipe", HOSTILE[:-1]],
        ["study", HOSTILE[:-1]],
        ["train", HOSTILE[:-1]],
        ["grow", str(tmp_path), "--hidden", HOSTILE[:-1], "--out", str(tmp_path / "o")],
    ):
        assert main(arguments) in (1, 2)
        assert_literal(capsys.readouterr().err, whole=False)


def test_names_of_tensors_are_literal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "a", llama_config())
    from tiny_checkpoints import read_config, read_folder

    tensors = read_folder(folder)
    tensors["[/x]\x1b[2J\nerror: y"] = tensors["model.norm.weight"]
    odd = write_folder(tmp_path / "b", read_config(folder), tensors)
    for arguments in (["diff", str(odd), str(folder)], ["plan", str(odd), "--layers", "+1"]):
        main(arguments)
        captured = capsys.readouterr()
        shown = captured.out + captured.err
        assert "\x1b" not in shown and "\nerror: y" not in shown and "[/x]" in shown


def test_names_mean_nothing_in_a_model_card(source: Path, tmp_path: Path) -> None:
    odd = source.with_name("a`b|[x](y)<script>\n# c")
    source.rename(odd)
    (odd / "README.md").write_text("---\nlicense: {a: 1}\nlanguage: [en]\n---\n")
    out = tmp_path / "g|[x](y)<b>"
    assert main(["grow", str(odd), "--layers", "+1", "--no-verify", "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "<script>" not in card.replace("`a'b|[x](y)<script>\\n# c`", "")
    assert "\n# c" not in card and "# g\\|\\[x\\](y)&lt;b\\>" in card
    assert "language:\n- en" in card and "license" not in card
