# SPDX-License-Identifier: Apache-2.0
"""Only regular files of bounded size are read, and nothing waits."""

import os
import socket
import tracemalloc

import pytest

from growkit.core.errors import CheckpointError, UsageError
from growkit.core.files import open_lock, open_regular, read_bytes, read_text, require_regular


def pipe(path):
    os.mkfifo(path)


def folder(path):
    path.mkdir()


def link_to_itself(path):
    path.symlink_to(path)


def link_to_device(path):
    path.symlink_to("/dev/zero")


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


@pytest.mark.parametrize("make", [pipe, folder, link_to_itself, link_to_device, unix_socket])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make):
    path = tmp_path / "file"
    make(path)
    for read in (read_bytes, read_text, open_regular, require_regular):
        with pytest.raises(CheckpointError, match=r"file' (is not a regular file|cannot be read)"):
            read(path)


@pytest.mark.parametrize("name", ["missing", "with\0nul", "x" * 4096])
def test_names_that_lead_nowhere(tmp_path, name):
    with pytest.raises(UsageError, match="cannot be read"):
        read_bytes(tmp_path / name, error=UsageError)


@pytest.mark.parametrize("make", [pipe, folder, link_to_itself, link_to_device])
def test_a_lock_is_a_regular_file(tmp_path, make):
    make(tmp_path / ".lock")
    with pytest.raises(CheckpointError, match=r"lock' is not a regular file"):
        open_lock(tmp_path / ".lock")
    open_lock(tmp_path / "new").close()
    assert (tmp_path / "new").is_file()


def test_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, limit=5) == b"12345"
    with pytest.raises(CheckpointError, match="is larger than 4 bytes"):
        read_bytes(path, limit=4)
    # Size 0 says nothing on /proc: only what was read counts.
    with pytest.raises(CheckpointError, match="larger than 4 bytes"):
        read_bytes(type(path)("/proc/self/status"), limit=4)


def test_a_small_file_takes_little_memory(tmp_path):
    """The limit is no size: 32 MB for each config.json would be."""
    (tmp_path / "file").write_bytes(b"12345")
    tracemalloc.start()
    try:
        assert read_bytes(tmp_path / "file") == b"12345"
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_link_to_a_file_and_text(tmp_path):
    (tmp_path / "blob").write_bytes(b"\xef\xbb\xbfa\xc3\xa9")
    (tmp_path / "link").symlink_to("blob")
    assert read_text(tmp_path / "link") == "aé"
    (tmp_path / "blob").write_bytes(b"ab\xff")
    with pytest.raises(CheckpointError, match=r"not UTF-8 text \(byte 2\)"):
        read_text(tmp_path / "blob")
