"""Readers of the kinds of text files, and what folders and patterns stand for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from growkit.core.errors import UsageError
from growkit.data.text_files import check_files, find_files, kind_of, read_documents


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[str], field: str = "text") -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": range(len(texts)), field: texts}), path)
    return path


TEXTS = [f"document {i}\nwith two lines, naïve café" for i in range(40)]


def test_one_document_a_row_and_one_a_text_file(tmp_path: Path) -> None:
    assert list(read_documents(write_jsonl(tmp_path / "a.jsonl", TEXTS))) == TEXTS
    assert list(read_documents(write_parquet(tmp_path / "a.parquet", TEXTS))) == TEXTS
    whole = tmp_path / "a.txt"
    whole.write_text("\n".join(TEXTS))
    assert list(read_documents(whole)) == ["\n".join(TEXTS)]
    assert list(read_documents(write_jsonl(tmp_path / "b.jsonl", ["x", "  \n", "y"]))) == ["x", "y"]
    assert list(read_documents(write_jsonl(tmp_path / "c.jsonl", ["x"], "body"), "body")) == ["x"]


def test_bad_files(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.txt' is not UTF-8 text \(byte 2"):
        list(read_documents(latin))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UsageError, match="line 2 is not JSON"):
        list(read_documents(broken))
    with pytest.raises(UsageError, match=r"line 1 has no text in field 'text'.*id, body"):
        list(read_documents(write_jsonl(tmp_path / "body.jsonl", ["x"], "body")))
    with pytest.raises(UsageError, match=r"no column 'text'.*Did you mean 'texts'"):
        list(read_documents(write_parquet(tmp_path / "body.parquet", ["x"], "texts")))
    fake = tmp_path / "fake.parquet"
    fake.write_text("no parquet")
    with pytest.raises(UsageError, match="is not a parquet file"):
        list(read_documents(fake))
    with pytest.raises(UsageError, match=r"unknown kind.*\.txt, \.jsonl, \.parquet"):
        check_files([tmp_path / "text.csv"])
    with pytest.raises(UsageError, match="does not exist"):
        check_files([tmp_path / "absent.txt"])


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"pip install 'growkit\[data\]'"):
        list(read_documents(path))


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_files(tmp_path: Path, ending: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    for name, content in (
        ("a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()),
        ("a.txt", "\n".join(TEXTS).encode()),
    ):
        path = tmp_path / f"{name}.{ending}"
        with pyarrow.output_stream(
            str(path), compression={"gz": "gzip", "zst": "zstd"}[ending]
        ) as f:
            f.write(content)
        assert list(read_documents(path)) == (TEXTS if "jsonl" in name else ["\n".join(TEXTS)])
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(UsageError, match="cannot be read to its end"):
            list(read_documents(path))
    assert kind_of(Path("x/b.JSONL.GZ")) == ".jsonl" and kind_of(Path("a.parquet.gz")) is None


def test_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b/two.jsonl", "a/one.txt", "a/deep/three.txt", "a/notes.md", "four.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")

    def names(*entries: str) -> list[str]:
        found = find_files(tmp_path / entry for entry in entries)
        return [path.relative_to(tmp_path).as_posix() for path in found]

    assert names("") == ["a/deep/three.txt", "a/one.txt", "b/two.jsonl", "four.txt"]
    assert names("b", "a/*.txt") == ["b/two.jsonl", "a/one.txt"]
    assert names("**/*.txt") == ["a/deep/three.txt", "a/one.txt", "four.txt"]
    assert names("four.txt", "") == ["four.txt", "a/deep/three.txt", "a/one.txt", "b/two.jsonl"]
    with pytest.raises(UsageError, match="No file matches the pattern"):
        names("c/*.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no text files"):
        names("empty")
    (tmp_path / "odd[1].txt").write_text("a name with brackets is no pattern")
    assert names("odd[1].txt") == ["odd[1].txt"]


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d b"}\n')
    assert list(read_documents(path)) == ["a? b"]
