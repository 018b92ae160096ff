"""Token files of other tools give the ids that their formats' specifications say.

The writers here are from those specifications, not from growkit's readers: numpy and struct alone.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import recipe_values, write_text

from growkit.advice.dry_run import dry_run
from growkit.core.errors import GrowkitError, UsageError
from growkit.data.packing import PackedDataset, PackedText, datasets, pack
from growkit.data.recipe import DataSection
from growkit.data.sources import corpus_of
from growkit.data.token_folders import find_token_files
from growkit.data.tokenizer import load_tokenizer, train_bpe
from growkit.training import Silent, train
from growkit.training.checkpoints import list_checkpoints
from growkit.training.metrics import read_metrics
from growkit.training.read_recipe import make_recipe

END = 0  # of the byte tokenizer
RNG = np.random.default_rng(0)
DOCUMENTS = [[*RNG.integers(1, 257, int(n)).tolist(), END] for n in RNG.integers(1, 40, 120)]
FLAT = [token for document in DOCUMENTS for token in document]
ENDS = np.cumsum([len(document) for document in DOCUMENTS])


def megatron(folder: Path, documents: Sequence[Sequence[int]], code: int, dtype: str) -> Path:
    """Every document but the first is one sequence; the first is two."""
    cut = max(len(documents[0]) // 2, 1)
    sequences = [documents[0][:cut], documents[0][cut:], *documents[1:]]
    lengths = [len(s) for s in sequences]
    item = np.dtype(dtype).itemsize
    pointers = np.cumsum([0, *lengths[:-1]]) * item
    firsts = [0, *range(2, len(sequences) + 1)]
    np.array([t for s in sequences for t in s], dtype).tofile(folder / "m_text_document.bin")
    (folder / "m_text_document.idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
        + struct.pack("<QQ", len(sequences), len(firsts))
        + np.array(lengths, "<i4").tobytes() + pointers.astype("<i8").tobytes()
        + np.array(firsts, "<i8").tobytes()
    )  # fmt: skip
    return folder / "m_text_document.bin"


def nanogpt(folder: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2") -> Path:
    path = folder / "train.bin"
    np.array([t for d in documents for t in d], dtype).tofile(path)
    return path


def llm_c(folder: Path, documents: Sequence[Sequence[int]], magic: int, version: int) -> Path:
    tokens = [t for d in documents for t in d]
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens)
    path = folder / "fineweb_train_000001.bin"
    dtype = {20240520: "<u2", 20240801: "<u4"}[magic]
    path.write_bytes(header.tobytes() + np.array(tokens, dtype).tobytes())
    return path


def datatrove(folder: Path, documents: Sequence[Sequence[int]], dtype: str) -> Path:
    path = folder / "00000_00000_shuffled.ds"
    np.array([t for d in documents for t in d], dtype).tofile(path)
    np.cumsum([len(d) for d in documents]).astype("<u8").tofile(f"{path}.index")
    return path


def litdata(folder: Path, documents: Sequence[Sequence[int]], code: int, dtype: str) -> Path:
    folder = folder / "optimized"
    folder.mkdir()
    chunks = []
    for number, part in enumerate((documents[:50], documents[50:])):
        sizes = [len(d) * np.dtype(dtype).itemsize for d in part]
        offsets = np.cumsum([4 + 4 * (len(part) + 1), *sizes]).astype("<u4")
        data = struct.pack("<I", len(part)) + offsets.tobytes()
        data += np.array([t for d in part for t in d], dtype).tobytes()
        name = f"chunk-0-{number}.bin"
        (folder / name).write_bytes(data)
        count = sum(map(len, part))
        chunks.append(
            {"chunk_bytes": len(data), "chunk_size": len(part), "filename": name, "dim": count}
        )
    config: dict[str, Any] = {
        "compression": None,
        "encryption": None,
        "item_loader": "TokensLoader",
    }
    config |= {"data_format": [f"no_header_tensor:{code}"], "chunk_bytes": 1 << 20}
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))
    return folder


def compressed(folder: Path) -> Path:
    """The same folder as the libraries write it with ``compression="zstd"``."""
    pyarrow = pytest.importorskip("pyarrow")
    index = json.loads((folder / "index.json").read_text())
    for entry in index.get("chunks", []) + index.get("shards", []):
        raw = entry["raw_data"]["basename"] if "raw_data" in entry else entry["filename"]
        name = f"{raw}.zstd" if "raw_data" in entry else raw.replace(".bin", ".zstd.bin")
        data = pyarrow.Codec("zstd").compress((folder / raw).read_bytes(), asbytes=True)
        (folder / raw).unlink()
        (folder / name).write_bytes(data)
        if "raw_data" in entry:
            entry["zip_data"] = {"basename": name, "bytes": len(data), "hashes": {}}
            entry["compression"] = "zstd"
        else:
            entry["filename"] = name
            index["config"] |= {"compression": "zstd"}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def mds(folder: Path, documents: Sequence[Sequence[int]], encoding: str, length: int = 0) -> Path:
    """Documents joined and cut into samples of a length, as LLM Foundry does, or one a sample."""
    folder = folder / "mds"
    folder.mkdir()
    flat = [t for d in documents for t in d]
    samples: list[Sequence[int]] = list(documents)
    if length:
        samples = [flat[at : at + length] for at in range(0, len(flat), length)]
        encoding = f"{encoding}:{length}" if len(flat) % length == 0 else encoding
    dtype = "<i8" if encoding == "bytes" else np.dtype(encoding.split(":")[1]).str
    fixed = length * np.dtype(dtype).itemsize if encoding.count(":") == 2 else None
    names, encodings = ["id", "name", "tokens"], ["int", "str", encoding]
    config: dict[str, Any] = {"column_names": names, "column_encodings": encodings}
    config |= {"column_sizes": [8, None, fixed], "format": "mds", "version": 2}
    shards = []
    for number, part in enumerate((samples[:5], samples[5:])):
        blobs = []
        for at, sample in enumerate(part):
            ids = np.array(sample, dtype).tobytes()
            if encoding.count(":") == 1:  # the shape, in as few bytes as hold it
                small = len(sample) < 256
                ids = struct.pack("<BB" if small else "<BH", 4 + (not small), len(sample)) + ids
            name = f"row {at}".encode()
            sizes = [len(name)] + ([len(ids)] if fixed is None else [])
            blobs.append(np.array(sizes, "<u4").tobytes() + struct.pack("<q", at) + name + ids)
        head = json.dumps(config).encode()
        offsets = np.cumsum([4 * (len(part) + 2) + len(head), *map(len, blobs)]).astype("<u4")
        data = struct.pack("<I", len(part)) + offsets.tobytes() + head + b"".join(blobs)
        file = f"shard.{number:05}.mds"
        (folder / file).write_bytes(data)
        raw = {"basename": file, "bytes": len(data), "hashes": {}}
        shards.append({**config, "compression": None, "raw_data": raw, "zip_data": None,
                       "samples": len(part), "size_limit": 1 << 26, "hashes": []})  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))
    return folder


WRITERS: dict[str, Any] = {
    "megatron-uint16": lambda f, d: megatron(f, d, 8, "<u2"),
    "megatron-int32": lambda f, d: megatron(f, d, 4, "<i4"),
    "nanogpt": nanogpt,
    "llm.c-gpt2": lambda f, d: llm_c(f, d, 20240520, 1),
    "llm.c-llama3": lambda f, d: llm_c(f, d, 20240801, 7),
    "datatrove-2": lambda f, d: datatrove(f, d, "<u2"),
    "datatrove-4": lambda f, d: datatrove(f, d, "<u4"),
    "litdata": lambda f, d: litdata(f, d, 16, "<i4"),
    "mds-int32": lambda f, d: mds(f, d, "ndarray:int32"),
    "mds-bytes": lambda f, d: mds(f, d, "bytes"),
    "litdata-zstd": lambda f, d: compressed(litdata(f, d, 16, "<i4")),
    "mds-zstd": lambda f, d: compressed(mds(f, d, "ndarray:int32")),
}


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bytes"
    train_bpe([], 257, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(byte_folder: Path) -> Any:
    return load_tokenizer(byte_folder)


def packed(path: Path, tokenizer: Any, cache: Path, **values: Any) -> PackedText:
    vocabulary = values.pop("vocabulary", None)
    section = DataSection.model_validate({"tokens": [str(path)], **values})
    return pack(corpus_of(section), tokenizer, "bytes", cache, Silent(), vocabulary=vocabulary)


@pytest.mark.parametrize("name", WRITERS)
def test_ids_and_documents_are_those_of_the_file(name: str, tokenizer: Any, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path, DOCUMENTS)
    (train,) = packed(path, tokenizer, tmp_path / "cache", eval_fraction=0).train
    assert train.tokens(0, len(train)).tolist() == FLAT
    assert train.documents == len(DOCUMENTS)
    starts = train.document_starts(0, len(train)).tolist()
    assert starts == [0, *ENDS[:-1].tolist()]
    # The ids of flat formats are mapped, not copied: the cache has what is known of them only.
    assert all(isinstance(shard.tokens, np.memmap) for shard in train.shards)
    assert ("mds" in name or "zstd" in name) == bool(list((tmp_path / "cache").rglob("tokens.bin")))
    again = pickle.loads(pickle.dumps(train))  # as a data-loading process gets it
    assert again.tokens(0, len(train)).tolist() == FLAT
    item = PackedDataset([train], 64, separate=True)[1]
    assert item["input_ids"].tolist() == FLAT[64:128]
    assert item["position_ids"].tolist() == [
        at - max([64, *(int(e) for e in ENDS if e <= at)]) for at in range(64, 128)
    ]


def test_the_same_documents_are_held_out_of_every_format(tokenizer: Any, tmp_path: Path) -> None:
    sides = set()
    for name, write in WRITERS.items():
        (tmp_path / name).mkdir()
        path = write(tmp_path / name, DOCUMENTS)
        found = packed(path, tokenizer, tmp_path / "cache", eval_fraction=0.2)
        (train,), (held_out,) = found.train, found.eval
        kept, out = (tuple(s.tokens(0, len(s)).tolist()) for s in (train, held_out))
        assert len(kept) + len(out) == len(FLAT) and 0 < len(out) < len(kept)
        sides.add((kept, out))
        assert PackedDataset(found.eval, 16).bytes_per_token is None
    assert len(sides) == 1


def test_a_file_without_end_of_text_holds_out_its_tail(tokenizer: Any, tmp_path: Path) -> None:
    """nanoGPT's shakespeare_char is one document."""
    ids = [token for token in FLAT if token != END]
    found = packed(nanogpt(tmp_path, [ids]), tokenizer, tmp_path / "cache", eval_fraction=0.1)
    (train,), (held_out,) = found.train, found.eval
    cut = round(len(ids) * 0.9)
    assert train.tokens(0, len(train)).tolist() == ids[:cut]
    assert held_out.tokens(0, len(held_out)).tolist() == ids[cut:]


def test_mixture_with_text_and_held_out_tokens(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n' * 9)
    (tmp_path / "val").mkdir()
    nanogpt(tmp_path / "val", DOCUMENTS[:5])
    prefix = megatron(tmp_path, DOCUMENTS, 8, "<u2").with_suffix("")
    section = DataSection.model_validate(
        {
            "mixture": [
                {"name": "old", "tokens": [str(prefix)], "weight": 3},
                {"name": "new", "files": [str(tmp_path / "a.jsonl")], "weight": 1},
            ],
            "eval_tokens": [str(tmp_path / "val" / "*.bin")],
            "sequence_length": 16,
        }
    )
    found = pack(corpus_of(section), tokenizer, "bytes", tmp_path / "cache", Silent())
    train, held_out = datasets(found, section)
    assert held_out is not None and list(train.parts()) == ["old", "new"]
    assert found.dropped == 5  # documents of the training file that are held out
    assert found.train[0].tokens(0, 50).tolist() == FLAT[ENDS[4] : ENDS[4] + 50]
    assert train.bytes_per_token is None


def test_ids_beyond_the_vocabulary(tokenizer: Any, tmp_path: Path) -> None:
    bad = [*FLAT[:99], 300, *FLAT[100:]]
    path, cache = nanogpt(tmp_path, [bad]), tmp_path / "cache"
    with pytest.raises(UsageError, match=r"Token 99 of .*train\.bin.* is 300 .* has 257 ids"):
        packed(path, tokenizer, cache)
    packed(path, tokenizer, cache, vocabulary=512)  # a model with more rows than the tokenizer
    with pytest.raises(UsageError, match=r"Token 99 of .* is 300"):  # from the cache, too
        packed(path, tokenizer, cache)
    nanogpt(tmp_path, DOCUMENTS, "<u4")
    with pytest.raises(UsageError, match=r"uint32 ids read as uint16.*token_dtype: uint32"):
        packed(path, tokenizer, cache)
    (train,) = packed(path, tokenizer, cache, token_dtype="uint32", eval_fraction=0).train
    assert train.tokens(0, len(train)).tolist() == FLAT
    negative = megatron(tmp_path, [[1, -7, 2]], 4, "<i4")
    with pytest.raises(UsageError, match=r"Token 1 of .* is -7"):
        packed(negative, tokenizer, cache, eval_fraction=0)


def _edit(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def _longer(folder: Path) -> None:
    """The index says that every shard has fewer bytes than it decompresses to."""
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        shard["raw_data"]["bytes"] -= 8
    (folder / "index.json").write_text(json.dumps(index))


def _cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - size)


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "megatron magic": ("megatron-uint16", lambda p: _edit(p.with_suffix(".idx"), 0, b"TNT"),
                       "begins with b'TNTDIDX"),
    "megatron type": ("megatron-uint16", lambda p: _edit(p.with_suffix(".idx"), 17, b"\x07"),
                      "type 7"),
    "megatron index cut": ("megatron-int32", lambda p: _cut(p.with_suffix(".idx"), 8), "need"),
    "megatron head cut": ("megatron-int32",
                          lambda p: p.with_suffix(".idx").write_bytes(b"MMIDIDX\0\0\1"), "cut off"),
    "megatron count": ("megatron-int32",
                       lambda p: _edit(p.with_suffix(".idx"), 18, b"\xff" * 8), "sequences need"),
    "megatron ids cut": ("megatron-int32", lambda p: _cut(p, 40), "counts .* there are"),
    "megatron half id": ("megatron-int32", lambda p: _cut(p, 2), "no whole number"),
    "megatron length": ("megatron-int32", lambda p: _edit(p.with_suffix(".idx"), 34, b"\xff" * 4),
                        "do not follow each other"),
    "megatron documents": ("megatron-int32",
                           lambda p: _edit(p.with_suffix(".idx"),
                                           p.with_suffix(".idx").stat().st_size - 8, b"\xff" * 7),
                           "beyond the sequences"),
    "nanogpt half id": ("nanogpt", lambda p: _cut(p, 1), "no whole number of uint16"),
    "nanogpt empty": ("nanogpt", lambda p: p.write_bytes(b""), "no tokens"),
    "llm.c cut": ("llm.c-gpt2", lambda p: _cut(p, 20), "header counts"),
    "llm.c version": ("llm.c-gpt2", lambda p: _edit(p, 4, b"\x09"), "version is 9"),
    "llm.c questions": ("llm.c-gpt2", lambda p: _edit(p, 0, struct.pack("<i", 20240522)),
                        "multiple-choice"),
    "datatrove cut": ("datatrove-2", lambda p: _cut(p, 40), "index ends at token"),
    "datatrove index cut": ("datatrove-2", lambda p: _cut(Path(f"{p}.index"), 3), "no list"),
    "datatrove order": ("datatrove-2", lambda p: _edit(Path(f"{p}.index"), 8, b"\xff" * 7),
                        "not in ascending order"),
    "litdata cut": ("litdata", lambda p: _cut(p / "chunk-0-1.bin", 8), "its index says"),
    "litdata gone": ("litdata", lambda p: (p / "chunk-0-0.bin").unlink(), "is not there"),
    "litdata offsets": ("litdata", lambda p: _edit(p / "chunk-0-0.bin", 0, b"\x05"), "offsets"),
    "litdata text": ("litdata",
                     lambda p: (p / "index.json").write_text(
                         (p / "index.json").read_text().replace("no_header_tensor:16", "str")),
                     "no plain token ids"),
    "mds cut": ("mds-int32", lambda p: _cut(p / "shard.00001.mds", 8), "its index says"),
    "mds offsets": ("mds-int32", lambda p: _edit(p / "shard.00001.mds", 4, b"\xff" * 4),
                    "offsets do not fit"),
    "mds samples": ("mds-int32", lambda p: _edit(p / "shard.00001.mds", 0, b"\xff" * 4),
                    "index is cut off"),
    "mds zstd longer": ("mds-zstd", lambda p: _longer(p), "decompresses to"),
    "litdata zstd damaged": ("litdata-zstd", lambda p: _edit(p / "chunk-0-0.zstd.bin", 0, b"none"),
                             "cannot be decompressed"),
    "mds text": ("mds-bytes",
                 lambda p: (p / "index.json").write_text(
                     (p / "index.json").read_text().replace('"tokens"', '"text"')),
                 "no token ids"),
    "mds gone": ("mds-bytes", lambda p: (p / "shard.00001.mds").unlink(), "is not there"),
}  # fmt: skip


@pytest.mark.parametrize("length", [7, 300])
@pytest.mark.parametrize("whole", [True, False], ids=["fixed", "free"])
def test_samples_of_mds_follow_each_other(
    length: int, whole: bool, tokenizer: Any, tmp_path: Path
) -> None:
    documents = [*DOCUMENTS, *([[5] * (-len(FLAT) % length)] if whole else [])]
    path = mds(tmp_path, documents, "ndarray:uint16", length)
    (train,) = packed(path, tokenizer, tmp_path / "cache", eval_fraction=0).train
    assert train.tokens(0, len(train)).tolist() == [t for d in documents for t in d]
    number = len(train.shards[0].tokens)  # where the first shard ends, so does a document
    assert set(train.document_starts(0, len(train)).tolist()) == {
        0, number, *(int(e) for e in ENDS if e < len(train))
    }  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_end_in_one_sentence(name: str, tokenizer: Any, tmp_path: Path) -> None:
    writer, damage, message = DAMAGE[name]
    path = WRITERS[writer](tmp_path, DOCUMENTS)
    damage(path)
    with pytest.raises(GrowkitError, match=message) as caught:
        packed(path, tokenizer, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_what_is_no_token_file(tmp_path: Path) -> None:
    for name, message in (("none.bin", "does not exist"), ("*.bin", "No token file matches")):
        with pytest.raises(UsageError, match=message):
            find_token_files([tmp_path / name])
    with pytest.raises(UsageError, match="holds no token files"):
        find_token_files([tmp_path])
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match=r"of an unknown kind.*Known kinds"):
        find_token_files([tmp_path / "a.txt"])
    path = nanogpt(tmp_path, DOCUMENTS)
    with pytest.raises(UsageError, match=r"Token files are named under data\.tokens"):
        corpus_of(DataSection.model_validate({"files": [str(path)]}))
    section = DataSection.model_validate({"tokens": [str(path)], "eval_tokens": [str(path)]})
    with pytest.raises(UsageError, match=r"in data\.tokens and in data\.eval_tokens"):
        corpus_of(section)
    corpus = corpus_of(DataSection.model_validate({"tokens": [str(path)]}))
    with pytest.raises(UsageError, match="holds token ids, and text is needed"):
        list(corpus.train_documents())
    values = recipe_values(path)
    values["data"] = {"tokens": [str(path)]}
    with pytest.raises(UsageError, match=r"train_bpe.* needs text"):
        make_recipe(values | {"tokenizer": {"train_bpe": 300}})


def test_a_run_on_ids_is_the_run_on_their_text(tmp_path: Path) -> None:
    """Oracle: the run on text. Bit for bit its losses, its resume too; only bytes are unknown."""
    values = recipe_values(write_text(tmp_path / "king.txt"), max_steps=6)
    values["data"] |= {"eval_fraction": 0, "document_attention": "separate"}
    by_text = train(make_recipe(values), tmp_path / "text")
    (tokens,) = (tmp_path / "text" / "training" / "data").glob("*/tokens.bin")
    (tmp_path / "king.bin").write_bytes(tokens.read_bytes())
    del values["data"]["files"]
    values["data"]["tokens"] = [str(tmp_path / "king.bin")]
    recipe, out = make_recipe(values), tmp_path / "ids"
    train(recipe, out)
    losses = [
        [row.get("loss") for row in read_metrics(folder / "training" / "metrics.jsonl")]
        for folder in (tmp_path / "text", out)
    ]
    assert losses[0] == losses[1] and any(losses[0]) and by_text.steps == 6
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "text" / "model.safetensors").read_bytes()
    shutil.rmtree(list_checkpoints(out / "training" / "checkpoints")[-1])  # as if killed at step 5
    (out / "model.safetensors").unlink()
    train(recipe, out)
    assert (out / "model.safetensors").read_bytes() == weights
    with (tmp_path / "king.bin").open("ab") as file:
        file.write(b"\x05\0" * 9)
    with pytest.raises(UsageError, match="data files changed"):
        train(recipe, out)


def test_a_dry_run_counts_ids(tmp_path: Path) -> None:
    path = nanogpt(tmp_path, DOCUMENTS * 9)
    values = recipe_values(path)
    del values["data"]["files"]
    values["data"] |= {"tokens": [str(path)], "eval_fraction": 0.1}
    found = dry_run(
        make_recipe(values), tmp_path / "out", resume="auto", overwrite=False, reporter=Silent()
    )
    assert found.text.tokens == 9 * len(FLAT) and found.text.bytes_per_token == 0


def test_datatrove_writes_what_is_read(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    flat = TokenizedFile(str(tmp_path), "00000.ds", token_size=2)
    indexed = MegatronTokenizedFile(str(tmp_path), "m", token_size=4)
    for document in DOCUMENTS:
        flat.write(document, None)
        indexed.write(document)
    flat.close()
    indexed.close()
    for name in ("00000.ds", "m.bin"):
        (train,) = packed(tmp_path / name, tokenizer, tmp_path / "c", eval_fraction=0).train
        assert train.tokens(0, len(train)).tolist() == FLAT
        assert train.documents == len(DOCUMENTS)


def test_streaming_writes_what_is_read(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("streaming")
    from streaming import MDSWriter

    kinds = ("ndarray:int32", None), ("ndarray:uint16", "zstd:3"), ("bytes", None)
    for number, (encoding, compression) in enumerate(kinds):
        out, columns = tmp_path / str(number), {"tokens": encoding}
        options = {"size_limit": 4000, "compression": compression}
        with MDSWriter(out=str(out), columns=columns, **options) as writer:
            for document in DOCUMENTS:
                dtype = np.int64 if encoding == "bytes" else encoding.partition(":")[2]
                ids = np.array(document, dtype)
                writer.write({"tokens": ids.tobytes() if encoding == "bytes" else ids})
        (train,) = packed(out, tokenizer, tmp_path / "c", eval_fraction=0).train
        assert train.tokens(0, len(train)).tolist() == FLAT and len(train.shards) > 1


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_litdata_writes_what_is_read(
    compression: str | None, tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("litdata")
    if compression:
        pytest.importorskip("zstd")
    import torch
    from litdata.streaming import Cache, TokensLoader

    options = {"chunk_bytes": 2000, "compression": compression}
    if compression:
        options["compression_level"] = "chunk"  # whole chunks
    cache = Cache(str(tmp_path / "lit"), item_loader=TokensLoader(block_size=8), **options)
    for number, document in enumerate(DOCUMENTS):
        cache[number] = torch.tensor(document, dtype=torch.int32)
    cache.done()
    cache.merge()
    (train,) = packed(tmp_path / "lit", tokenizer, tmp_path / "c", eval_fraction=0).train
    assert train.tokens(0, len(train)).tolist() == FLAT and len(train.shards) > 2
    assert train.documents == len(DOCUMENTS)
