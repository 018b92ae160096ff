# SPDX-License-Identifier: Apache-2.0
"""Paths that lead nowhere, wherever a command takes one: a sentence, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_checkpoints as tiny

from growkit.cli.main import main


@pytest.mark.parametrize("name", ["loop", "loop/x", "x" * 300, "y/" * 2046, "nul\0x"])
def test_paths_that_lead_nowhere(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tiny.make_folder(tmp_path / "a", tiny.llama_config()))
    (tmp_path / "loop").symlink_to("loop")
    path = f"{tmp_path}/{name}"
    for command in (
        ["grow", source, "--layers", "+1", "--no-verify", "-q", "--out", path],
        ["inspect", path],
        ["plan", source, "--layers", "+1", "--recipe", path],
        ["diff", source, path],
        ["report", path],
    ):
        assert main(command) in (1, 2), command
        said = capsys.readouterr().err
        assert "Traceback" not in said and "unexpected" not in said, said
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "loop"}
