# SPDX-License-Identifier: Apache-2.0
"""More shards than files may be open, on both sides; descriptors shared by threads."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny_checkpoints as tiny

from growkit.checkpoint import OutputTensor, ShardWriter, open_checkpoint, plan_shards
from growkit.checkpoint.reading import OpenFiles

# The limit is of the process, and the one that runs the tests has many files open.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from growkit.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_two_hundred_shards_under_a_limit_of_64(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    config = tiny.llama_config(num_hidden_layers=22)
    tensors = tiny.make_tensors(config)
    source = tiny.write_folder(tmp_path / "source", config, tensors, shards=200)
    arguments = ["--ffn", "x2", "--no-verify", "-q", "--out"]
    command = ["grow", str(source), *arguments, str(tmp_path / "many"), "--max-shard-size", "1kB"]
    subprocess.run([sys.executable, "-c", LIMITED, *command], check=True)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 150
    one = tiny.write_folder(tmp_path / "one", config, tensors)
    tiny.grow(one, tmp_path / "plain", ffn="x2")
    many, plain = tiny.read_folder(tmp_path / "many"), tiny.read_folder(tmp_path / "plain")
    assert many.keys() == plain.keys()
    assert all(tiny.same_bits(many[name], plain[name]) for name in plain)


def test_no_more_files_are_open_than_the_limit(tmp_path: Path) -> None:
    opened: list[str] = []
    files = OpenFiles(lambda name: opened.append(name) or os.open(os.devnull, os.O_RDONLY), limit=3)
    for name in "abcab":
        with files.use(name):
            pass
    assert opened == list("abc")
    with files.use("a") as kept, files.use("d"), files.use("e"):
        assert os.fstat(kept)  # in use, so it stayed open
        with files.use("f"):  # more are in use than the limit
            pass
    assert opened == list("abcdef")
    with files.use("b"):
        pass
    assert opened == list("abcdefb")
    files.close()


def test_a_file_makes_room_when_the_system_has_no_more() -> None:
    full = False

    def open_file(name: str) -> int:
        if full and len(files._files) >= 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), name)
        return os.open(os.devnull, os.O_RDONLY)

    files = OpenFiles(open_file, limit=100)
    for name in "abc":
        with files.use(name):
            pass
    full = True
    with files.use("d"), files.use("e"), pytest.raises(OSError, match="Too many open"):
        files.pin("f")
    files.close()


def test_threads_and_evictions_keep_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight threads write and read sixteen shards through two descriptors."""
    monkeypatch.setattr("growkit.checkpoint.reading.affordable_files", lambda: 2)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    tensors = [OutputTensor(f"t{number:02}", "U8", (64,)) for number in range(16)]
    plan = plan_shards(tensors, 64)
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for offset in range(0, 64, 8):
                for number in range(first, 16, 8):
                    writer.write(f"t{number:02}", offset, bytes([number]) * 8)
        except BaseException as error:
            errors.append(error)

    with ShardWriter(tmp_path, plan) as writer:
        threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors and len(synced) >= 17  # every shard and the index, some more than once
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        for number in range(16):
            assert checkpoint.read(f"t{number:02}").tobytes() == bytes([number]) * 64
