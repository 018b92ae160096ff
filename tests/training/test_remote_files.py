# SPDX-License-Identifier: Apache-2.0
"""Text on object storage, stood in for by fsspec's memory://."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from training_runs import figures, recipe_values, weights

from growkit.core.errors import UsageError
from growkit.data.remote_files import content_of, is_remote, size_of, url_of
from growkit.data.text_files import find_files, read_documents
from growkit.data.token_folders import find_token_files
from growkit.training import Silent, train
from growkit.training.read_recipe import make_recipe

TEXTS = [f"row {i} of the old king's wine" for i in range(300)]


@pytest.fixture
def store() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    system.pipe("/bucket/a/rows.jsonl", lines)
    system.pipe("/bucket/a/more.jsonl.gz", gzip.compress(lines))
    system.pipe("/bucket/a/notes.md", b"no text")
    yield system
    system.rm("/bucket", recursive=True)


def test_addresses_survive_a_path() -> None:
    assert url_of(Path("s3://bucket/a/b.txt")) == "s3://bucket/a/b.txt"
    assert url_of(Path("file:///a/b.txt")) == "file:///a/b.txt"
    assert is_remote(Path("hf://datasets/org/name")) and not is_remote(Path("a/b.txt"))
    assert not is_remote(Path("C:/corpus")) and url_of(Path("a/b.txt")) == "a/b.txt"


def test_files_folders_and_patterns(store: Any) -> None:
    names = ["memory:/bucket/a/more.jsonl.gz", "memory:/bucket/a/rows.jsonl"]
    for entry in ("memory://bucket/a", "memory://bucket/**/*.jsonl*"):
        assert [str(path) for path in find_files([Path(entry)])] == names
    one = find_files([Path("memory://bucket/a/rows.jsonl")])
    assert list(read_documents(one[0])) == TEXTS
    assert list(read_documents(Path(names[0]))) == TEXTS
    assert size_of(one[0]) == store.info("/bucket/a/rows.jsonl")["size"]
    before = content_of(one[0])
    assert content_of(one[0]) == before
    store.pipe("/bucket/a/rows.jsonl", b'{"text": "another"}\n')
    assert content_of(one[0]) != before


def test_parquet_and_zst(store: Any) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    with store.open("/bucket/a/t.parquet", "wb") as file:
        parquet.write_table(pyarrow.table({"text": TEXTS}), file)
    assert list(read_documents(Path("memory://bucket/a/t.parquet"))) == TEXTS
    packed = pyarrow.compress(("\n".join(TEXTS)).encode(), codec="zstd", asbytes=True)
    store.pipe("/bucket/a/t.txt.zst", packed)
    assert list(read_documents(Path("memory://bucket/a/t.txt.zst"))) == ["\n".join(TEXTS)]


def test_a_run_is_that_on_local_files_and_reads_once(store: Any, tmp_path: Path) -> None:
    local = tmp_path / "rows.jsonl"
    local.write_bytes(store.cat("/bucket/a/rows.jsonl"))
    outs = []
    for name, file in (("local", str(local)), ("remote", "memory://bucket/a/rows.jsonl")):
        values = recipe_values(local, max_steps=4, decay_steps=1)
        values["data"]["files"] = [file]
        values["data"]["cache_dir"] = str(tmp_path / f"cache-{name}")
        outs.append(train(make_recipe(values), tmp_path / name).out)
        cached = set((tmp_path / f"cache-{name}").iterdir())
        train(make_recipe(values), tmp_path / f"{name}-again", reporter=Silent())
        assert set((tmp_path / f"cache-{name}").iterdir()) == cached
    assert figures(outs[0]) == figures(outs[1]) and weights(outs[0]) == weights(outs[1])


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("memory://bucket/none.txt", "stands for no text files"),
        ("memory://bucket/a/*.txt", "stands for no text files"),
        ("memory://bucket/a/notes.md", "of an unknown kind"),
        ("nosuch://bucket/a.txt", "cannot be read: Protocol not known"),
    ],
)
def test_what_is_refused(store: Any, entry: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        find_files([Path(entry)])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UsageError, match=r"needs s3fs, which is not installed.*pip install s3fs"):
        find_files([Path("s3://bucket/a.txt")])


def test_token_files_have_to_be_on_a_disk() -> None:
    with pytest.raises(UsageError, match=r"'s3://bucket/x\.bin' are on an object store"):
        find_token_files([Path("s3://bucket/x.bin")])
