# SPDX-License-Identifier: Apache-2.0
"""The same growth again recognises what it has written; a source that changes is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny

from growkit.checkpoint import staging
from growkit.cli.main import main
from growkit.surgery import execute


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny.make_folder(tmp_path / "source", tiny.llama_config())
    (folder / "tokenizer_config.json").write_text("{}    ")
    return folder


def grow(source: Path, out: Path, *more: str) -> int:
    command = ["grow", str(source), "--out", str(out), "--ffn", "x2", "--layers", "+1", *more]
    return main([*command, "--no-verify"])


def test_the_same_command_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert grow(source, out) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / staging.MARKER).touch()  # as a kill right after the renaming leaves it
    assert grow(source, out) == 0
    assert "was there already, whole" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert grow(source, out, "--json", "-q") == 0
    assert '"already_there": true' in capsys.readouterr().out


def other_tokenizer(source: Path, out: Path) -> None:
    (source / "tokenizer_config.json").write_text('{"model_max_length": 5}')


Change = Callable[[Path, Path], Any]


def other_weights(source: Path, out: Path) -> None:
    shutil.rmtree(source)
    tiny.make_folder(source, tiny.llama_config(), seed=1)


def damaged(source: Path, out: Path) -> None:
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_off(source: Path, out: Path) -> None:
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def other_config(source: Path, out: Path) -> None:
    path = out / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


@pytest.mark.parametrize("change", [other_weights, other_tokenizer, damaged, cut_off, other_config])
def test_what_is_not_the_same_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change
) -> None:
    """Negative control: one bit, or weights of another run under the same name and shapes."""
    out = tmp_path / "out"
    assert grow(source, out) == 0
    change(source, out)
    (out / staging.MARKER).touch()
    assert grow(source, out) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert (out / staging.MARKER).exists()


def test_another_request_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert grow(source, out) == 0
    assert grow(source, out, "--seed", "3") == 2


def in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")


def in_place_with_the_old_time(path: Path) -> None:
    before = path.stat()
    in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchanged(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("change", [in_place, in_place_with_the_old_time, exchanged, removed])
def test_a_source_that_changes_while_it_is_read(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Callable[[Path], None],
) -> None:
    real = execute.execute

    def then_change(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        if (source / name).exists():
            change(source / name)

    monkeypatch.setattr("growkit.growing.execute", then_change)
    code, err = grow(source, tmp_path / "out"), capsys.readouterr().err
    assert code == 1
    assert f"{name}' changed while it was read" in err
    assert sorted(os.listdir(tmp_path)) == ["source"]


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a\0b"])
def test_a_path_that_no_system_has_is_wrong_usage(
    source: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the first thing that is done with it is to look for an earlier growth."""
    assert grow(source, tmp_path / name) == 2
    assert "growkit.json" not in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["source"]
