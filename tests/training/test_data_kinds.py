# SPDX-License-Identifier: Apache-2.0
"""Data that is not what growkit reads: what it is, said with the way out; sizes are bounded."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from growkit.core.errors import UsageError
from growkit.data import text_files as text
from growkit.data import token_cache
from growkit.data.text_files import check_files, find_files, read_documents

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "field", "cause", "remedy"),
    [
        ({"input_ids": [1, 2, 3]}, "input_ids", "it holds token ids.*3 integers", "t.decode"),
        ({"input_ids": [1, 2, 3]}, "text", "no text in field 'text'", "'input_ids' holds token"),
        ({"messages": CHAT}, "messages", "holds chat messages", "apply_chat_template"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "text", "no text", "chat messages"),
        ({"text": ["a", "b"]}, "text", "holds a list of 2 texts", "Join them"),
        ({"text": {"en": "x"}}, "text", "an object with the keys en", "fields there are: text"),
        ({"text": None, "body": "x"}, "text", "holds null", "holds text: body"),
        ({"text": 5}, "text", "holds int", "fields there are: text"),
        ({"texts": "x"}, "text", "no text in field 'text'", "Did you mean 'texts'"),
        ("text", "text", "no JSON object, but text", "one JSON object a line"),
    ],
)
def test_what_a_field_holds(tmp_path: Path, row: Any, field: str, cause: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=rf"line 1 has no text in field '{field}'.*") as caught:
        list(read_documents(lines(tmp_path / "a.jsonl", row), field))
    assert re.search(cause, caught.value.cause) and remedy in caught.value.remedy
    assert f"Did you mean '{field}'" not in str(caught.value)


def test_a_parquet_column_of_token_ids(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"input_ids": [[1, 2, 3]]}), path)
    with pytest.raises(UsageError, match=r"holds token ids \(a list of 3 integers\), not text"):
        list(read_documents(path, "input_ids"))


def run_shell(command: str, folder: Path) -> None:
    python = shlex.quote(sys.executable)
    subprocess.run(command.replace("python", python, 1), shell=True, check=True, cwd=folder)


def command_of(error: UsageError) -> str:
    return error.remedy[error.remedy.index("python -c") :]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a b.json", json.dumps([{"text": "one"}, {"text": "two"}])),
        ("pretty.json", json.dumps([{"text": "one"}, {"text": "two"}], indent=2)),
        ("a.csv", 'id,text\n1,one\n2,"two"\n'),
        ("a.tsv", "id\ttext\n1\tone\n2\ttwo\n"),
    ],
)
def test_the_conversion_that_is_advised_works(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match="unknown kind") as caught:
        check_files([tmp_path / name])
    run_shell(command_of(caught.value), tmp_path)
    [made] = tmp_path.glob("*.jsonl")
    assert list(read_documents(made)) == ["one", "two"]


def test_an_array_that_is_called_jsonl(tmp_path: Path) -> None:
    for number, indent in enumerate((None, 1)):
        path = tmp_path / f"a{number}.jsonl"
        path.write_text(json.dumps([{"text": "one"}], indent=indent))
        with pytest.raises(UsageError, match="is one JSON array") as caught:
            list(read_documents(path))
        run_shell(command_of(caught.value), tmp_path)
        assert list(read_documents(tmp_path / f"a{number}-2.jsonl")) == ["one"]


def test_other_endings_say_what_to_do(tmp_path: Path) -> None:
    for name, word in (("a.json", "mv"), ("a.ndjson", "mv"), ("a.md", "cp"), ("a.zip", "Unpack")):
        (tmp_path / name).write_text('{"text": "x"}\n{"text": "y"}\n')
        with pytest.raises(UsageError, match="unknown kind") as caught:
            check_files([tmp_path / name])
        assert word in caught.value.remedy
    with pytest.raises(UsageError, match="holds no text files") as caught:
        find_files([tmp_path])
    assert "mv" in caught.value.remedy
    upper = lines(tmp_path / "A.JSONL", {"text": "x"})
    assert find_files([tmp_path]) == [upper] and list(read_documents(upper)) == ["x"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        content = "one\n" if name == "a.txt" else '{"text": "one"}\n'
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert [document.strip() for document in read_documents(tmp_path / name)] == ["one"]
    (tmp_path / "bad.txt").write_bytes(b"\xef\xbb\xbf" + b"x" * (1 << 20) + b"\xff")
    with pytest.raises(UsageError, match=rf"byte {3 + (1 << 20)}"):
        list(read_documents(tmp_path / "bad.txt"))


def test_large_texts_are_cut_and_long_lines_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "LARGEST", 1000)
    monkeypatch.setattr(text, "_BLOCK", 300)
    whole = "".join(f"line {number} naïve\r\n" for number in range(400))
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(whole.encode()))
    found = list(read_documents(path))
    assert "".join(found) == whole.replace("\r\n", "\n")
    assert len(found) > 5 and all(len(part) <= 1000 and part[-1] == "\n" for part in found)
    one_line = tmp_path / "b.txt"
    one_line.write_text("x" * 2500)
    assert [len(part) for part in read_documents(one_line)] == [1000, 1000, 500]
    exact = tmp_path / "c.txt"
    exact.write_text("x" * 1000)
    assert [len(part) for part in read_documents(exact)] == [1000]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"x" * 5000 + b'"}\n'))
    with pytest.raises(UsageError, match="line 1 is longer than"):
        list(read_documents(path))


def test_damaged_compression_and_deep_json(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(os.urandom(5000).hex().encode()))
    content[200:220] = b"\0" * 20
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read to its end"):
        list(read_documents(tmp_path / "a.txt.gz"))
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000)
    with pytest.raises(UsageError, match="line 1 is not JSON"):
        list(read_documents(tmp_path / "deep.jsonl"))


def test_a_compressed_line_without_end_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a twentieth of the size: what is held does not grow with the file."""
    monkeypatch.setattr(text, "LARGEST", 2 << 20)
    path = tmp_path / "bomb.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(b"x" * (1 << 20))
    tracemalloc.start()
    try:
        total = sum(len(part) for part in read_documents(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 40 << 20
    assert peak < 16 << 20, peak


def test_leftovers_of_killed_runs_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    from filelock import FileLock

    for key in ("dead", "alive"):
        (tmp_path / f"{key}.partial").mkdir()
        (tmp_path / f"{key}.partial" / "tokens.bin").write_bytes(b"x")
    old, fresh = tmp_path / "file-hashes.json.1.partial", tmp_path / "file-hashes.json.2.partial"
    old.write_text("{}")
    fresh.write_text("{}")
    os.utime(old, (0, 0))
    with FileLock(tmp_path / "alive.lock"):
        token_cache.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.partial")) == ["alive.partial", fresh.name]
