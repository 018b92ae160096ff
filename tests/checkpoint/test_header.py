"""The header reader: accepts what safetensors writes, names what is wrong with anything else."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import entry, make_tensors, raw_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from growkit.checkpoint import DTYPES, read_header
from growkit.core.errors import CheckpointError


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = make_tensors()
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "key": "ü"})
    header = read_header(path)
    assert header.metadata == {"format": "pt", "key": "ü"}
    assert header.tensors.keys() == tensors.keys()
    content = path.read_bytes()
    for name, info in header.tensors.items():
        assert info.shape == tensors[name].shape
        assert DTYPES[info.dtype].numpy == tensors[name].dtype
        assert content[info.start : info.start + info.nbytes] == tensors[name].tobytes()
    assert header.data_start + header.data_size == len(content)
    with safe_open(path, framework="np") as file:
        assert list(header.tensors) == list(file.offset_keys())


def test_knows_every_dtype_of_safetensors_in_its_order() -> None:
    """The order of the types decides the bytes of a file, so it is read off a file."""
    from safetensors import TensorSpec, serialize

    library = {
        "bool": "BOOL", "float4_e2m1fn_x2": "F4", "uint8": "U8", "int8": "I8",
        "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
        "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "int16": "I16",
        "uint16": "U16", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint32": "U32",
        "float32": "F32", "complex64": "C64", "float64": "F64", "int64": "I64", "uint64": "U64",
    }  # fmt: skip
    memory = np.zeros(64, np.uint8)
    specs = {
        # Names in the opposite order, so that only the dtype can bring about the result.
        f"{number:02d}": TensorSpec(
            dtype=name, shape=[8], data_ptr=memory.ctypes.data, data_len=DTYPES[ours].bits
            if name != "float4_e2m1fn_x2" else 8,
        )
        for number, (name, ours) in enumerate(library.items())
    }  # fmt: skip
    raw = bytes(serialize(specs))
    written = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert [value["dtype"] for value in written.values()] == list(library.values())[::-1]
    assert sorted(library.values(), key=lambda name: DTYPES[name].rank) == list(library.values())
    for value in written.values():
        size = value["data_offsets"][1] - value["data_offsets"][0]
        assert DTYPES[value["dtype"]].nbytes(int(np.prod(value["shape"]))) == size


BROKEN: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{nonsense", b"", "string was expected"),
    "no object": (b"[1, 2]  ", b"", "not a JSON object"),
    "empty header": (b"", b"", "not a JSON object"),
    "not UTF-8": (b'{"\xff\xfe": 1}', b"", "UTF-8"),
    "text after": (b"{} {}", b"", "text after"),
    "lone surrogate": (rb'{"\ud800": 1}', b"", "damaged string"),
    "duplicate tensor": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        bytes(16),
        "'a' appears twice",
    ),
    "duplicate field": (
        b'{"a":{"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        "once each",
    ),
    "duplicate metadata": (b'{"__metadata__":{"k":"1","k":"2"}}', b"", "'k' of __metadata__"),
    "metadata not text": (b'{"__metadata__":{"k":1}}', b"", "string was expected"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "'a'.*data_offsets"),
    "extra field": ({"a": entry() | {"x": 1}}, bytes(8), "'a'.*once each"),
    "no description": ({"a": 7}, b"", "'a' has no description"),
    "unknown dtype": ({"a": entry("BF17")}, bytes(8), "'a'.*'BF17'.*Did you mean 'BF16'"),
    "dtype not text": ({"a": entry(["F32"])}, bytes(8), "'a'.*unknown dtype"),
    "negative dimension": ({"a": entry(shape=[-2])}, bytes(8), "'a'.*impossible shape"),
    "fractional dimension": ({"a": entry(shape=[2.0])}, bytes(8), "'a'.*impossible shape"),
    "boolean dimension": ({"a": entry(shape=[True, 2])}, bytes(8), "'a'.*impossible shape"),
    "shape no list": ({"a": entry(shape=2)}, bytes(8), "'a'.*impossible shape"),
    "overflow": ({"a": entry(shape=[2**40, 2**40])}, bytes(8), "'a'.*impossible shape"),
    "hidden overflow": (
        {"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}, b"", "'a'.*impossible shape"
    ),
    "huge number": (
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 3000 + b'],"data_offsets":[0,8]}}',
        bytes(8),
        "'a'.*impossible shape",
    ),
    "40 dimensions": ({"a": entry(shape=[1] * 39 + [2])}, bytes(8), "'a'.*impossible shape"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, bytes(8), "'a'.*data_offsets"),
    "reversed offsets": ({"a": entry(offsets=[8, 0])}, bytes(8), "'a'.*data_offsets"),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, bytes(8), "'a'.*data_offsets"),
    "wrong size": ({"a": entry(offsets=[0, 4])}, bytes(4), "'a' has 4 bytes.*takes 8"),
    "split byte": ({"a": entry("F4", [3], [0, 1])}, bytes(1), "'a'.*impossible shape"),
    "overlap": (
        {"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "'b' overlaps"
    ),
    "same bytes twice": ({"a": entry(), "b": entry()}, bytes(8), "'b' overlaps"),
    "gap": ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), "'b' leaves a gap"),
    "gap at the start": ({"a": entry(offsets=[4, 12])}, bytes(12), "'a' leaves a gap"),
    "trailing bytes": ({"a": entry()}, bytes(9), "1 bytes after the last tensor"),
    "truncated data": ({"a": entry()}, bytes(7), "truncated.*8 bytes.*holds 7"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, b"", "'a' has no description"),
    "deep nesting inside": (
        b'{"a":{"dtype":' + b"[" * 4000 + b"}", b"", "'a' is not described by valid JSON"
    ),
    "deep metadata": (b'{"__metadata__":' + b'{"a":' * 100_000, b"", "string was expected"),
    "unfinished": (b'{"a"', b"", "':' was expected"),
    "long entry": (
        {"a": {"shape": [0] * 100_000}}, b"", "'a' has no description"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_header_is_named(tmp_path: Path, case: str) -> None:
    header, data, message = BROKEN[case]
    path = raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "'model.safetensors'" in caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize("length", [0, 3, 7])
def test_file_shorter_than_its_length_prefix(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(length))
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(path)


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1000).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"truncated.*1000"):
        read_header(path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(path)


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):  # opening the pipe would wait for ever
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_header(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "absent")


def test_disk_order_does_not_have_to_be_header_order(tmp_path: Path) -> None:
    header = {
        "late": entry(offsets=[8, 16]),
        "empty": entry(shape=[0], offsets=[8, 8]),
        "a": entry(),
    }
    path = raw_file(tmp_path / "m.safetensors", header, bytes(16))
    assert list(read_header(path).tensors) == ["a", "empty", "late"]


def _sparse(path: Path, header_length: int, start: bytes) -> Path:
    with open(path, "wb") as file:
        file.write(header_length.to_bytes(8, "little") + start)
        file.truncate(200_000_000_000)
    return path


@pytest.mark.parametrize(
    ("length", "start"),
    [
        (2**63, b"{"),  # larger than any memory
        (150_000_000_000, b"{"),  # inside the (sparse) file
        (100_000_001, b"{"),
        (100_000_000, b"\0"),  # allowed length, hopeless content
    ],
)
def test_hostile_length_costs_no_memory(tmp_path: Path, length: int, start: bytes) -> None:
    path = _sparse(tmp_path / "m.safetensors", length, start)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "hostile",
    [
        b'{"a":{"shape":[' + b"0," * 1_000_000 + b"0]}}",
        b'{"a":{"shape":[' + b"[]," * 600_000 + b"0]}}",
        b'{"a":[' + b"{}," * 600_000 + b"0]}",
        b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in range(110_000)) + b"}}",
    ],
    ids=["numbers", "lists", "objects", "metadata"],
)
def test_hostile_values_are_refused_before_they_are_built(tmp_path: Path, hostile: bytes) -> None:
    path = raw_file(tmp_path / "m.safetensors", hostile)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_header(path)
        # bytes and text of the header, and at most the metadata that is allowed
        assert tracemalloc.get_traced_memory()[1] < 3 * len(hostile) + 20_000_000
    finally:
        tracemalloc.stop()


def test_number_of_tensors_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growkit.checkpoint.header._MAX_TENSORS", 10)
    header = {str(number): entry(shape=[0], offsets=[0, 0]) for number in range(10)}
    path = tmp_path / "m.safetensors"
    assert len(read_header(raw_file(path, header)).tensors) == 10
    header["one more"] = entry(shape=[0], offsets=[0, 0])
    with pytest.raises(CheckpointError, match="more than 10 tensors"):
        read_header(raw_file(path, header))


VALID = save(make_tensors(), metadata={"format": "pt"})
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")


@settings(
    max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, HEADER_END - 1),
            st.one_of(st.binary(max_size=3), st.sampled_from([b"0", b"9", b"}", b'"', b",", b"-"])),
        ),
        max_size=4,
    ),
    cut=st.integers(0, len(VALID)),
    tail=st.binary(max_size=4),
)
def test_mutations_never_crash(
    tmp_path: Path, changes: list[tuple[int, bytes]], cut: int, tail: bytes
) -> None:
    """Whatever is changed: CheckpointError, or a header that safetensors accepts as well."""
    content = bytearray(VALID)
    for place, replacement in changes:
        content[place : place + 1] = replacement
    if cut % 3 == 0:
        del content[cut:]
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(bytes(content) + (tail if cut % 5 == 0 else b""))
    tracemalloc.start()
    try:
        header = read_header(path)
    except CheckpointError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2_000_000
    try:
        with safe_open(path, framework="np") as file:
            assert set(file.keys()) == set(header.tensors)
    except SafetensorError as error:
        pytest.fail(f"growkit accepts what safetensors refuses: {error}")
