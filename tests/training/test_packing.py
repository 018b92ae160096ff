"""Packed tokens are the documents, in order, each ended by the end-of-text token."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growkit.core.errors import UsageError
from growkit.data import token_cache
from growkit.data.held_out import TRAIN, decide
from growkit.data.packing import PackedDataset, PackedText, datasets, pack, stream_of
from growkit.data.recipe import DataSection
from growkit.data.sources import Corpus, Source
from growkit.data.token_stream import one_side
from growkit.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_bpe
from growkit.training import Silent


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bytes"
    train_bpe([], 257, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(byte_folder: Path) -> Any:
    return load_tokenizer(byte_folder)


def rows(path: Path, texts: list[str]) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(path.stem, files=[path])


def packed(corpus: Corpus, tokenizer: Any, cache: Path, **options: Any) -> PackedText:
    return pack(corpus, tokenizer, "bytes", cache, Silent(), **options)


def section(**values: Any) -> DataSection:
    return DataSection.model_validate({"files": "sample", **values})


def test_byte_tokenizer_keeps_every_text(tokenizer: Any) -> None:
    text = "Naïve café, \n\n\t 中文 🎉 a  b"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokenizer) == 257
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_bpe_learns_merges_and_is_reproducible(tmp_path: Path) -> None:
    text = "the king and the queen and the king " * 50
    for name in ("a", "b"):
        train_bpe([text], 300, tmp_path / name)
    tokenizer = load_tokenizer(tmp_path / "a")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) < len(text) / 3
    assert tokenizer.decode(ids) == text
    assert tokenizer_fingerprint(tmp_path / "a") == tokenizer_fingerprint(tmp_path / "b")


def test_no_tokenizer_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no tokenizer.*tokenizer\.train_bpe"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_documents_are_joined_by_end_of_text(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus([rows(tmp_path / "a.jsonl", ["first\nline", "second"])], eval_fraction=0)
    for piece in (token_cache.PIECE, 4):  # long documents are tokenized in pieces, without a seam
        monkeypatch.setattr(token_cache, "PIECE", piece)
        (train,) = packed(corpus, tokenizer, tmp_path / "cache").train
        end = tokenizer.eos_token
        assert tokenizer.decode(train.tokens(0, len(train))) == f"first\nline{end}second{end}"
        assert train.utf8_bytes == len("first\nlinesecond") and train.documents == 2
        assert train.shards[0].tokens.dtype == np.uint16


def test_no_evaluation_when_none_is_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    corpus = Corpus([rows(tmp_path / "a.jsonl", ["first", "second"])], eval_fraction=0)
    found = packed(corpus, tokenizer, tmp_path / "cache")
    assert datasets(found, section(eval_fraction=0, sequence_length=4))[1] is None


TEXTS = [f"document {i} " * (i % 7 + 1) for i in range(300)]


def test_split_streams_are_the_documents_of_each_side(tokenizer: Any, tmp_path: Path) -> None:
    """Oracle: the text of the corpus itself, joined in memory."""
    sample = tmp_path / "b.txt"
    sample.write_text("\n".join(TEXTS))
    corpus = Corpus([rows(tmp_path / "a.jsonl", TEXTS), Source("b", files=[sample])], 0.1)
    found = packed(corpus, tokenizer, tmp_path / "cache")
    end = tokenizer.eos_token
    for streams, documents in (
        (found.train, list(corpus.train_documents())),
        (found.eval, list(corpus.eval_documents())),
    ):
        one, two = (tokenizer.decode(stream.tokens(0, len(stream))) for stream in streams)
        assert one == "".join(text + end for text in documents[:-1])
        assert two == documents[-1] + (end if streams is found.eval else "")
        assert streams[0].documents == len(documents) - 1
        assert streams[0].utf8_bytes == sum(len(text) for text in documents[:-1])


def test_shards_and_workers_do_not_change_the_tokens(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [rows(tmp_path / f"{i}.jsonl", TEXTS[i::3]).files[0] for i in range(3)]
    corpus = Corpus([Source("all", files=files)], 0.1)
    monkeypatch.setattr(token_cache, "BATCH", 500)
    expected = packed(corpus, tokenizer, tmp_path / "one", workers=1)
    monkeypatch.setattr(token_cache, "PARALLEL_FROM", 0)
    monkeypatch.setattr("growkit.data.sources.SHARD_BYTES", 4000)
    found = packed(corpus, tokenizer, tmp_path / "three", workers=3)
    assert len(expected.train[0].shards) == 1 and len(found.train[0].shards) == 3
    for a, b in zip(expected.train + expected.eval, found.train + found.eval, strict=True):
        assert np.array_equal(a.tokens(0, len(a)), b.tokens(0, len(b)))
    assert len(list((tmp_path / "three").glob("*/meta.json"))) == 3


def test_cache_is_used_and_keyed_by_content(tokenizer: Any, tmp_path: Path) -> None:
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one\n" * 100)
    corpus = Corpus([Source(files=[path])])
    first = packed(corpus, tokenizer, cache)
    tokens = first.train[0].shards[0].folder / "tokens.bin"
    tokens.write_bytes(np.zeros(401, "<u2").tobytes())
    again = packed(corpus, tokenizer, cache)
    assert not again.train[0].tokens(0, 100).any() and again.key == first.key
    path.write_text("two\n" * 100)
    other = packed(corpus, tokenizer, cache)
    assert other.key != first.key and other.train[0].tokens(0, 100).any()
    assert pack(corpus, tokenizer, "another", cache, Silent()).key != other.key


def test_only_the_changed_shard_is_tokenized_again(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("growkit.data.sources.SHARD_BYTES", 1)
    files = [rows(tmp_path / f"{i}.jsonl", TEXTS[i::3]).files[0] for i in range(3)]
    corpus = Corpus([Source("all", files=files)], 0.1)
    packed(corpus, tokenizer, tmp_path / "cache")
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*/meta.json")}
    rows(files[1], ["another", "text"])
    packed(corpus, tokenizer, tmp_path / "cache")
    now = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*/meta.json")}
    assert len(now) == 4 and written.items() <= now.items()


def test_copies_for_data_loading_processes_are_maps(tokenizer: Any, tmp_path: Path) -> None:
    import pickle

    corpus = Corpus([rows(tmp_path / "a.jsonl", TEXTS * 20)], 0.1)
    dataset = PackedDataset(packed(corpus, tokenizer, tmp_path / "cache").train, 16, separate=True)
    copy = pickle.dumps(dataset)
    tokens = len(dataset.streams[0])
    assert len(copy) < tokens / 2
    for key, value in pickle.loads(copy)[7].items():
        assert value.equal(dataset[7][key])
    array = PackedDataset(np.arange(64), 16)
    assert pickle.loads(pickle.dumps(array))[1]["input_ids"].equal(array[1]["input_ids"])


def test_killed_tokenizing_starts_over_cleanly(
    tokenizer: Any, byte_folder: Path, tmp_path: Path
) -> None:
    """kill -9 while workers are busy: nothing half-written has a final name, no worker stays."""
    lines = "".join(json.dumps({"text": f"{i} " + "word " * 2000}) + "\n" for i in range(600))
    (tmp_path / "big.jsonl").write_text(lines)
    program = (
        "if __name__ == '__main__':\n"
        "    import sys; from pathlib import Path; from growkit.training import Silent\n"
        "    from growkit.data import token_cache\n"
        "    from growkit.data.packing import pack\n"
        "    from growkit.data.sources import Corpus, Source\n"
        "    from growkit.data.tokenizer import load_tokenizer\n"
        "    token_cache.PARALLEL_FROM, token_cache.BATCH = 0, 50_000\n"
        "    here = Path(sys.argv[1]); files = [here / 'big.jsonl']\n"
        "    pack(Corpus([Source(files=files)]), load_tokenizer(Path(sys.argv[2])), 'bytes',\n"
        "         here / 'cache', Silent(), workers=2)\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path), str(byte_folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    cache = tmp_path / "cache"
    while process.poll() is None:
        if any(path.stat().st_size > 100_000 for path in cache.glob("*.partial/tokens.bin")):
            break
        time.sleep(0.001)
    children = [p.parent for p in Path("/proc").glob("[0-9]*/stat") if _parent(p) == process.pid]
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(cache.glob("*/meta.json"))
    assert len(children) >= 2
    deadline = time.monotonic() + 30
    while any(_runs(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(child) for child in children)
    found = packed(Corpus([Source(files=[tmp_path / "big.jsonl"])]), tokenizer, cache, workers=1)
    assert found.train[0].documents + found.eval[0].documents == 600
    assert not list(cache.glob("*.partial"))


def _fields(stat: Path) -> list[str]:
    try:
        return stat.read_text().rsplit(")", 1)[1].split()
    except OSError:  # it ended in the meantime
        return ["Z", "0"]


def _parent(stat: Path) -> int:
    return int(_fields(stat)[1])


def _runs(process: Path) -> bool:
    return _fields(process / "stat")[0] != "Z"


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    held_out=st.lists(st.booleans(), min_size=12, max_size=12),
    length=st.integers(1, 7),
)
def test_any_part_of_a_stream_and_its_document_starts(
    sizes: list[int], held_out: list[bool], length: int
) -> None:
    """Oracle: the documents of one side, joined as lists."""
    documents = [[10 * i + j for j in range(size)] for i, size in enumerate(sizes)]
    flat = np.array([token for document in documents for token in document], np.uint16)
    whole = stream_of(flat, np.cumsum(sizes).tolist())
    whole.shards[0].records.hashes[:] = [i + 1 for i in range(len(sizes))]
    chosen = np.array([i + 1 for i, out in enumerate(held_out) if out], np.uint64)
    stream = one_side("a", whole.shards, decide([], 0, chosen), TRAIN)
    kept = [d for d, out in zip(documents, held_out, strict=False) if not out]
    joined = [token for document in kept for token in document]
    assert len(stream) == len(joined) and stream.documents == len(kept)
    dataset = PackedDataset([stream], length, separate=True)
    for i in range(len(dataset)):
        item, expected = dataset[i], joined[i * length : (i + 1) * length]
        assert item["input_ids"].tolist() == expected
        positions, previous = [], None
        for token in expected:
            same = previous is not None and token // 10 == previous // 10
            positions.append(positions[-1] + 1 if same else 0)
            previous = token
        assert item["position_ids"].tolist() == positions
        labels = [t if p else -100 for t, p in zip(expected, positions, strict=True)]
        assert item["labels"].tolist() == labels


def test_sequences() -> None:
    dataset = PackedDataset(np.arange(11, dtype=np.uint16), 4)
    assert len(dataset) == 2
    assert dataset[1]["input_ids"].tolist() == dataset[1]["labels"].tolist() == [4, 5, 6, 7]
    assert "position_ids" not in dataset[1]
    with pytest.raises(IndexError):
        dataset[2]
    two = PackedDataset([stream_of(np.arange(i * 100, i * 100 + 9)) for i in range(3)], 4)
    assert [two[i]["input_ids"][0].item() for i in range(6)] == [0, 4, 100, 104, 200, 204]
    assert two.sizes == [2, 2, 2]


def test_too_little_text(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a few words\n" * 4)
    found = packed(Corpus([Source(files=[path])]), tokenizer, tmp_path / "cache")
    with pytest.raises(UsageError, match=r"training text has \d+ tokens, fewer than one sequence"):
        datasets(found, section(sequence_length=512))
    with pytest.raises(UsageError, match="held-out text has"):
        datasets(found, section(sequence_length=20))


def test_documents_of_the_held_out_files_are_left_out(tokenizer: Any, tmp_path: Path) -> None:
    class Listening(Silent):
        def warn(self, text: str) -> None:
            warnings.append(text)

    warnings: list[str] = []
    held_out = rows(tmp_path / "b.jsonl", [*TEXTS[:20], "new"])
    corpus = Corpus([rows(tmp_path / "a.jsonl", TEXTS)], held_out=held_out)
    found = pack(corpus, tokenizer, "bytes", tmp_path / "cache", Listening())
    assert found.dropped == 20 and found.train[0].documents == 280 and found.eval[0].documents == 21
    assert warnings == ["20 documents of the training text are held out elsewhere: left out"]
