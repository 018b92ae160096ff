# SPDX-License-Identifier: Apache-2.0
"""Each operation on files of a growth fails once: a sentence, nothing half-written or lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import faults
import pytest
import tiny_checkpoints as tiny

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

# What may happen to a file that is read, and to one that is written besides.
READING = ("EIO", "EMFILE", "ENFILE", "ESTALE")
WRITING = (*READING, "ENOSPC", "EDQUOT", "EROFS", "ENAMETOOLONG", "ELOOP")


def make_source(folder: Path) -> Path:
    source = tiny.make_folder(folder, tiny.llama_config(num_hidden_layers=1))
    (source / "tokenizer_config.json").write_text("{}")
    (source / "growkit_training.json").write_text('{"trained_tokens": 5}')
    return source


def command(source: Path, out: Path, *more: str) -> list[str]:
    options = ["--ffn", "x2", "--no-verify", "--threads", "1", "-q", *more]
    return ["grow", str(source), "--out", str(out), *options]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.kill)])
def test_one_operation_fails(tmp_path: Path, overwrite: bool, step: int) -> None:
    source = make_source(tmp_path / "source")
    more = ["--overwrite"] if overwrite else []
    log, events = tmp_path / "log", []

    def make(out: Path) -> Path:
        if overwrite:
            out.mkdir(parents=True)
            (out / "config.json").write_bytes(b"{}")
        return out

    clean = make(tmp_path / "clean" / "out")
    assert faults.main(command(source, clean, *more)) == 0
    wanted, old = faults.content(clean), {"config.json": b"{}"} if overwrite else None
    assert wanted is not None

    def note(number: int, event: str, path: str) -> None:
        os.write(2, f"{path}\n".encode())

    events = faults.run(
        command(source, make(tmp_path / "noted" / "out"), *more), log, within=tmp_path, fault=note
    ).err.splitlines()
    renamed = max(number for number, path in enumerate(events) if path.endswith("out.partial"))
    assert len(events) > 60
    ends = set()
    for number in [*range(0, renamed, step), *range(renamed, len(events))]:
        out = make(tmp_path / f"case{number}" / "out")
        kinds = READING if events[number].startswith(str(source)) else WRITING
        fault = faults.raising(number, getattr(errno, kinds[number % len(kinds)]))
        end = faults.run(command(source, out, *more), log, within=tmp_path, fault=fault)
        found, said = faults.content(out), (number, end)
        assert end.hit, said
        in_place = "in place and whole" in end.err
        if end.code == 0:  # it did without, and did the same
            assert found == wanted, said
        else:
            assert end.code == 1, said
            assert end.err.startswith("error: ") and end.err.count("\n") <= 2, said
            assert "None" not in end.err and "Traceback" not in end.err, said
        if in_place:
            assert found is not None and found.items() >= wanted.items(), said
            again = faults.run(command(source, out, *more), log, within=tmp_path)
            assert again.code == 0 and faults.content(out) == wanted, (said, again)
        elif end.code:
            assert found == old, said
        if out.parent.exists():
            assert set(os.listdir(out.parent)) <= {"out"}, said
        ends.add((end.code, in_place))
    assert {(1, False), (1, True)} <= ends


def test_one_operation_is_interrupted(tmp_path: Path) -> None:
    """Reads and writes are repeated: the same bytes."""
    source = make_source(tmp_path / "source")
    clean = tmp_path / "clean" / "out"
    assert faults.main(command(source, clean)) == 0
    met = set()

    def fault(number: int, event: str, path: str) -> None:
        if event in ("pwrite", "preadv", "write", "copy_file_range") and number % 2:
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))

    end = faults.run(
        command(source, tmp_path / "out"), tmp_path / "log", within=tmp_path, fault=fault
    )
    met |= {entry.split()[1] for entry in end.hit.split("; ") if " " in entry}
    assert {"pwrite", "preadv"} <= met
    assert end.code == 0, end
    assert faults.content(tmp_path / "out") == faults.content(clean)
