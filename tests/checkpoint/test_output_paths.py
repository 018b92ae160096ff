# SPDX-License-Identifier: Apache-2.0
"""Output paths that no system has, disks that are too small, and errors of the system in words."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from growkit.checkpoint import staged_output, staging
from growkit.core.errors import GrowkitError, UsageError
from growkit.core.os_errors import about, explained

Usage = namedtuple("Usage", "total used free")


def publish(out: Path, *, overwrite: bool = False, needed_bytes: int = 0) -> None:
    with staged_output(out, overwrite=overwrite, needed_bytes=needed_bytes, sources=[]) as folder:
        (folder / "config.json").write_text("{}")


def looping(folder: Path) -> Path:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a"


@pytest.mark.parametrize("kind", ["4,096 bytes", "long name", "loop", "below a loop", "NUL"])
def test_a_path_that_no_system_has(tmp_path: Path, kind: str) -> None:
    out = {
        "4,096 bytes": lambda: Path(str(tmp_path) + "/d" * 2048),
        "long name": lambda: tmp_path / ("x" * 300),
        "loop": lambda: looping(tmp_path),
        "below a loop": lambda: looping(tmp_path) / "out",
        "NUL": lambda: tmp_path / "a\0b",
    }[kind]()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UsageError, match=r"too long|in a circle|NUL") as caught:
        publish(out)
    assert caught.value.remedy
    assert sorted(os.listdir(tmp_path)) == before


def test_a_path_through_a_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"cannot be written into '.*/file', which is a file"):
        publish(tmp_path / "file" / "deeper" / "out")
    assert (tmp_path / "file").read_text() == "x"


def test_a_name_that_only_the_partial_folder_makes_too_long(tmp_path: Path) -> None:
    with pytest.raises(GrowkitError, match=r"cannot be written into.*too long") as caught:
        publish(tmp_path / ("x" * 250))
    assert "shorter" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_overwriting_counts_what_the_old_folder_frees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    publish(out)
    (out / "model.safetensors").write_bytes(b"x" * 3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10_000_000))
    with pytest.raises(GrowkitError, match=r"beside the old folder.*10.*MB free") as caught:
        publish(out, overwrite=True, needed_bytes=12_000_000)
    assert "Remove the old folder first, which frees 3." in caught.value.remedy
    with pytest.raises(GrowkitError) as caught:
        publish(out, overwrite=True, needed_bytes=14_000_000)
    assert "another disk" in caught.value.remedy and "takes 3." in caught.value.remedy
    # A file with a second name elsewhere is not freed.
    os.link(out / "model.safetensors", tmp_path / "second-name")
    with pytest.raises(GrowkitError) as caught:
        publish(out, overwrite=True, needed_bytes=12_000_000)
    assert "Remove the old folder" not in caught.value.remedy


@pytest.mark.parametrize("name", ["sync", "remove"])
def test_a_failure_after_the_renaming_says_that_the_folder_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = tmp_path / "out"
    publish(out)

    def fail(path: Path) -> None:
        if name == "remove" or path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(staging, name, fail)
    with pytest.raises(GrowkitError, match=r"in place and whole.*Input/output") as caught:
        publish(out, overwrite=True)
    assert caught.value.exit_code == 1
    assert (out / "config.json").read_text() == "{}"
    monkeypatch.undo()
    publish(out, overwrite=True)
    assert sorted(os.listdir(out)) == ["config.json"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [getattr(errno, name) for name in (
    "EIO", "ENOSPC", "EDQUOT", "EMFILE", "ENFILE", "EINTR", "EROFS", "ENAMETOOLONG", "ELOOP",
    "EACCES", "ESTALE", "EXDEV",
)])  # fmt: skip
def test_an_error_of_the_system_in_words(code: int) -> None:
    said = explained(OSError(code, os.strerror(code), "/data/model.safetensors"))
    assert "'/data/model.safetensors'" in said.cause and said.cause.endswith(".")
    nameless = explained(OSError(code, os.strerror(code)))
    what = "The disk is full" if code == errno.ENOSPC else "file"
    assert "None" not in str(nameless) and what.lower() in nameless.cause.lower()
    with pytest.raises(OSError) as caught, about(Path("/data/x")):
        raise OSError(code, os.strerror(code))
    assert caught.value.filename == "/data/x"


def test_a_full_target_is_named_and_not_the_source() -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/source/a", None, "/target/a")
    assert "/target/a" in explained(error).cause
