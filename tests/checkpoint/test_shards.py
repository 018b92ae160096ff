"""Planning of files: sizes, order, and the bytes that safetensors itself would write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import make_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from growkit.checkpoint import DTYPES, OutputTensor, parse_size, plan_shards, read_header
from growkit.core.errors import UsageError

NAMES = {dtype.numpy: name for name, dtype in DTYPES.items() if dtype.numpy is not None}


def describe(tensors: dict[str, np.ndarray]) -> list[OutputTensor]:
    return [OutputTensor(n, NAMES[tensor.dtype], tensor.shape) for n, tensor in tensors.items()]


def test_one_file_has_the_header_of_save_file() -> None:
    tensors = make_tensors()
    plan = plan_shards(describe(tensors), 10**9)
    (shard,) = plan.shards
    written = save(tensors, metadata={"format": "pt"})
    assert shard.name == "model.safetensors"
    assert written.startswith(shard.header)
    assert shard.size == len(written)
    assert plan.index is None
    assert plan.output_size == len(written)
    for name, tensor in tensors.items():
        place = plan.places[name]
        assert written[place.start : place.start + place.nbytes] == tensor.tobytes()


def test_fills_files_in_the_given_order() -> None:
    tensors = [OutputTensor(f"t{number}", "U8", (4,)) for number in range(5)]
    plan = plan_shards([*tensors, OutputTensor("big", "U8", (50,)), OutputTensor("z", "U8", ())], 9)
    groups: dict[str, list[str]] = {}
    for name, place in plan.places.items():
        groups.setdefault(place.shard, []).append(name)
    assert groups == {
        "model-00001-of-00005.safetensors": ["t0", "t1"],
        "model-00002-of-00005.safetensors": ["t2", "t3"],
        "model-00003-of-00005.safetensors": ["t4"],
        "model-00004-of-00005.safetensors": ["big"],
        "model-00005-of-00005.safetensors": ["z"],
    }
    assert plan.index is not None
    index = json.loads(plan.index)
    assert index["metadata"] == {"total_parameters": 71, "total_size": 71}
    assert index["weight_map"] == {name: place.shard for name, place in plan.places.items()}
    assert plan.output_size == sum(shard.size for shard in plan.shards) + len(plan.index)


def test_no_tensors_is_one_empty_file() -> None:
    plan = plan_shards([], 1)
    assert [shard.name for shard in plan.shards] == ["model.safetensors"]
    assert plan.shards[0].header == save({}, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "tensors",
    [
        [OutputTensor("a", "F32", (1,)), OutputTensor("a", "F32", (2,))],
        [OutputTensor("__metadata__", "F32", (1,))],
        [OutputTensor("a", "float32", (1,))],
        [OutputTensor("a", "F32", (-1,))],
        [OutputTensor("a", "F4", (3,))],
    ],
)
def test_impossible_tensors(tensors: list[OutputTensor]) -> None:
    with pytest.raises(ValueError, match=r"'(a|__metadata__)'"):
        plan_shards(tensors, 100)


@settings(max_examples=100, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from([n for n in DTYPES if DTYPES[n].numpy is not None]),
                  st.lists(st.integers(0, 5), max_size=3)),
        max_size=12,
    ),
    max_shard_size=st.integers(1, 400),
)  # fmt: skip
def test_any_plan_is_a_valid_checkpoint(
    tmp_path_factory: Any, tensors: dict[str, tuple[str, list[int]]], max_shard_size: int
) -> None:
    outputs = [OutputTensor(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    plan = plan_shards(outputs, max_shard_size)
    assert plan == plan_shards(outputs, max_shard_size)
    folder: Path = tmp_path_factory.mktemp("plan")
    found = {}
    for shard in plan.shards:
        (folder / shard.name).write_bytes(shard.header.ljust(shard.size, b"\0"))
        header = read_header(folder / shard.name)
        found |= header.tensors
        assert header.data_size <= max_shard_size or len(
            [info for info in header.tensors.values() if info.nbytes]
        ) == 1  # fmt: skip
    assert {n: (i.dtype, list(i.shape)) for n, i in found.items()} == tensors
    for name, info in found.items():
        place = plan.places[name]
        assert (place.shard, place.start, place.nbytes) == (info.shard, info.start, info.nbytes)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("5 gb", 5_000_000_000),
        ("4GiB", 4 << 30),
        ("1.5MB", 1_500_000),
        ("0.5KiB", 512),
        ("2TB", 2_000_000_000_000),
        ("1.001kb", 1001),
        ("123", 123),
        (123, 123),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "5G", "5B", "5 gigabytes", "-1GB", "0", "0.1", "1e9", "nan", "٣GB", "5GBGB", -3],
)
def test_sizes_that_are_refused(text: str | int) -> None:
    with pytest.raises(UsageError, match="5GB") as caught:
        parse_size(text)
    assert repr(text) in caught.value.cause


def test_shard_size_must_be_positive() -> None:
    with pytest.raises(UsageError, match="not positive"):
        plan_shards([], 0)
