"""Without what Windows and macOS lack: inspect, plan and grow --no-verify work by design."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tiny_checkpoints as tiny

from growkit.core import systems

# os and modules as they are there; what Python's own library needs is imported before.
FOREIGN = """
import os, sys
import asyncio, multiprocessing.connection, pathlib, shutil, subprocess, tempfile
missing_modules = {modules}
missing_names = {names}
for name in missing_modules:
    sys.modules[name] = None
for name in missing_names:
    if hasattr(os, name):
        delattr(os, name)
opening = os.open
def open_files_only(path, *rest, **options):
    if {no_folders} and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opening(path, *rest, **options)
os.open = open_files_only
from growkit.cli.main import main
source, out = sys.argv[1:]
codes = [
    main(["inspect", source, "--quiet"]),
    main(["plan", source, "--ffn", "x2", "--quiet"]),
    main(["grow", source, "--ffn", "x2", "--out", out, "--no-verify", "--quiet"]),
    main(["grow", source, "--ffn", "x3", "--out", out, "--no-verify", "--overwrite", "--quiet"]),
]
assert "torch" not in sys.modules
import growkit.study.one_run, growkit.model_code.renew
print(codes)
"""
WINDOWS = {
    "modules": ["fcntl", "resource", "pwd", "grp", "termios", "tty", "readline"],
    "names": "O_DIRECTORY O_NOFOLLOW O_CLOEXEC O_NONBLOCK preadv pwritev pread pwrite sendfile "
    "copy_file_range sched_getaffinity getuid geteuid fchmod posix_fallocate fork",
    "no_folders": True,
}
MACOS = {
    "modules": [],
    "names": "copy_file_range sched_getaffinity posix_fallocate memfd_create",
    "no_folders": False,
}


def test_what_windows_and_macos_lack_is_not_needed(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "source", tiny.llama_config())
    written = []
    for name, system in {"here": None, "windows": WINDOWS, "macos": MACOS}.items():
        out = tmp_path / name
        if system is None:
            script = FOREIGN.format(modules=[], names=[], no_folders=False)
        else:
            script = FOREIGN.format(**(system | {"names": str(system["names"]).split()}))
        result = subprocess.run(
            [sys.executable, "-c", script, str(source), str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip().endswith("[0, 0, 0, 0]"), result.stdout + result.stderr
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2], "the same bytes on every system"


def test_locks_are_exclusive_and_end_with_their_file(tmp_path: Path) -> None:
    first = systems.open_folder(tmp_path)
    assert systems.lock_open_file(first)
    second = systems.open_folder(tmp_path)
    assert not systems.lock_open_file(second)
    os.close(first)
    assert systems.lock_open_file(second)
    assert systems.is_opened_as(tmp_path, second)
    os.close(second)
    assert list(tmp_path.iterdir()) == []


def test_positional_calls_agree_with_and_without_the_system(tmp_path: Path, monkeypatch) -> None:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    for absent in ((), ("preadv", "pwrite")):
        for name in absent:
            monkeypatch.delattr(os, name)
        assert systems.write_at(descriptor, memoryview(b"abcdef"), 3) == 6
        found = bytearray(4)
        assert systems.read_at(descriptor, memoryview(found), 5) == 4 and found == b"cdef"
        assert systems.read_at(descriptor, memoryview(found), 100) == 0
    os.close(descriptor)
