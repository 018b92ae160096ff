"""Writing shards: any order, any thread, any way of copying, the same bytes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from growkit.checkpoint import (
    Checkpoint,
    OutputTensor,
    ShardWriter,
    content_hash,
    open_checkpoint,
    plan_shards,
)
from growkit.checkpoint import reading as raw_bytes
from growkit.core.errors import CheckpointError, GrowkitError

Make = Callable[..., Path]


def outputs(checkpoint: Checkpoint) -> list[OutputTensor]:
    return [OutputTensor(i.name, i.dtype, i.shape) for i in checkpoint.tensors.values()]


def copy_all(checkpoint: Checkpoint, folder: Path, max_shard_size: int = 10**9) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(checkpoint.config_bytes)
    with ShardWriter(folder, plan_shards(outputs(checkpoint), max_shard_size)) as writer:
        for info in checkpoint.tensors.values():
            descriptor = checkpoint.descriptor(info.shard)
            writer.copy(info.name, 0, descriptor, info.start, info.nbytes)


def test_one_file_is_byte_identical_to_save_file(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint()
    with open_checkpoint(source) as checkpoint:
        copy_all(checkpoint, tmp_path / "out")
        with ShardWriter(_new(tmp_path / "written"), plan_shards(outputs(checkpoint), 10**9)) as w:
            for name in reversed(checkpoint.tensors):  # the order of the writes does not matter
                w.write(name, 0, checkpoint.read(name))
    expected = (source / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
    assert (tmp_path / "written" / "model.safetensors").read_bytes() == expected


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_shards_are_read_by_safetensors(make_checkpoint: Make, tmp_path: Path) -> None:
    with open_checkpoint(make_checkpoint(sharded=True)) as checkpoint:
        copy_all(checkpoint, tmp_path / "out", max_shard_size=70)
        with open_checkpoint(tmp_path / "out") as copied:
            assert len(copied.shards) > 2
            assert content_hash(copied) == content_hash(checkpoint)
            for shard in copied.shards:
                with safe_open(tmp_path / "out" / shard, framework="np") as file:
                    assert file.metadata() == {"format": "pt"}
                    assert {copied.tensors[name].shard for name in file.offset_keys()} == {shard}


KINDS: list[Any] = [np.float32, np.float16, np.int8, np.bool_, ml_dtypes.bfloat16]


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 6), max_size=3)),
        min_size=1,
        max_size=10,
    ),
    max_shard_size=st.integers(1, 600),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(
    tmp_path_factory: Any, shapes: list[tuple[Any, list[int]]], max_shard_size: int, seed: int
) -> None:
    """Random tensors, files of any size, writes cut at random places and in random order."""
    rng = np.random.default_rng(seed)
    tensors = {
        f"t{number}": rng.integers(0, 2, size=shape).astype(kind)
        for number, (kind, shape) in enumerate(shapes)
    }
    first: Path = tmp_path_factory.mktemp("first")
    second: Path = tmp_path_factory.mktemp("second")
    (first / "config.json").write_text("{}")
    (second / "config.json").write_text("{}")
    save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(first) as source:
        with ShardWriter(second, plan_shards(outputs(source), max_shard_size)) as writer:
            for name in rng.permutation(list(tensors)):
                content = tensors[name].tobytes()
                cut = int(rng.integers(0, len(content) + 1))
                info = source.tensors[name]
                rest = len(content) - cut
                descriptor = source.descriptor(info.shard)
                writer.copy(name, cut, descriptor, info.start + cut, rest)
                writer.write(name, 0, content[:cut])
        with open_checkpoint(second) as target:
            assert content_hash(target) == content_hash(source)


def test_what_is_not_written_is_zero_and_takes_no_space(tmp_path: Path) -> None:
    size = 50_000_000
    tensors = [OutputTensor("zero", "U8", (size,)), OutputTensor("one", "U8", (4,))]
    with ShardWriter(tmp_path, plan_shards(tensors, 10**9)) as writer:
        writer.write("one", 1, b"\x07")
    path = tmp_path / "model.safetensors"
    assert path.stat().st_blocks * 512 < 1_000_000
    loaded = load_file(path)
    assert loaded["one"].tolist() == [0, 7, 0, 0]
    assert not loaded["zero"].any()


def _refuse(code: int) -> Callable[..., int]:
    def call(*_: Any, **__: Any) -> int:
        raise OSError(code, os.strerror(code))

    return call


KERNEL_COPIES: dict[str, Callable[..., int] | None] = {
    "absent": None,
    "another file system": _refuse(errno.EXDEV),
    "old kernel": _refuse(errno.ENOSYS),
    "not supported": _refuse(errno.EOPNOTSUPP),
    "invalid": _refuse(errno.EINVAL),
    "nothing": lambda *_: 0,
}
if hasattr(os, "copy_file_range"):
    _real = os.copy_file_range
    KERNEL_COPIES["short"] = lambda a, b, n, i, o: _real(a, b, min(n, 3), i, o)


@pytest.mark.parametrize("case", KERNEL_COPIES)
def test_every_way_of_copying(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    replacement = KERNEL_COPIES[case]
    if replacement is None:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    else:
        monkeypatch.setattr(os, "copy_file_range", replacement, raising=False)
    monkeypatch.setattr(raw_bytes, "_COPY_BUFFER_BYTES", 5)
    monkeypatch.setattr(raw_bytes, "_thread", threading.local())
    real_preadv, real_pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, b, o: real_preadv(fd, [b[0][:2]], o))
    monkeypatch.setattr(os, "pwrite", lambda fd, b, o: real_pwrite(fd, b[:3], o))
    source = make_checkpoint()
    with open_checkpoint(source) as checkpoint:
        copy_all(checkpoint, tmp_path / "out")
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kernel", [True, False])
def test_source_cut_while_copying(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    source = make_checkpoint()
    with open_checkpoint(source) as checkpoint:
        os.truncate(source / "model.safetensors", checkpoint.tensors["fp8"].start + 1)
        with pytest.raises(CheckpointError, match=r"'(fp8|mask)'.*became shorter"):
            copy_all(checkpoint, tmp_path / "out")


def test_writes_outside_a_tensor_are_refused(tmp_path: Path) -> None:
    tensors = [OutputTensor("a", "U8", (4,)), OutputTensor("b", "U8", (4,))]
    with ShardWriter(tmp_path, plan_shards(tensors, 100)) as writer:
        writer.write("b", 0, b"bbbb")
        for offset in (1, 4, -1):
            with pytest.raises(ValueError, match="not inside 'a'"):
                writer.write("a", offset, b"xxxx")
            with pytest.raises(ValueError, match="not inside 'a'"):
                writer.copy("a", offset, 0, 0, 4)
        with pytest.raises(ValueError, match="not contiguous"):
            writer.write("a", 0, np.zeros((2, 2), np.uint8).T[:, ::-1])
        with pytest.raises(KeyError):
            writer.write("c", 0, b"")
    assert load_file(tmp_path / "model.safetensors")["b"].tobytes() == b"bbbb"


def test_threads_write_the_same_bytes(make_checkpoint: Make, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"t{n}": rng.integers(0, 256, 40_000, dtype=np.uint8) for n in range(24)}
    source = make_checkpoint(tensors=tensors)
    errors: list[BaseException] = []
    with open_checkpoint(source) as checkpoint:
        plan = plan_shards(outputs(checkpoint), 200_000)
        with ShardWriter(_new(tmp_path / "out"), plan) as writer:

            def work(part: int) -> None:
                try:
                    for number, info in enumerate(checkpoint.tensors.values()):
                        begin, half = part * 10_000, 5_000
                        content = tensors[info.name].data[begin : begin + half]
                        writer.write(info.name, begin, content)
                        begin += half
                        descriptor = checkpoint.descriptor(info.shard)
                        writer.copy(info.name, begin, descriptor, info.start + begin, half)
                        assert number < 24
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not errors
        (tmp_path / "out" / "config.json").write_text("{}")
        with open_checkpoint(tmp_path / "out") as copied:
            assert content_hash(copied) == content_hash(checkpoint)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate", "copy_file_range"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    monkeypatch.setattr(os, call, _refuse(code), raising=False)
    with (
        open_checkpoint(make_checkpoint()) as checkpoint,
        pytest.raises(GrowkitError, match=r"disk became full.*'model\.safetensors'"),
    ):
        copy_all(checkpoint, tmp_path / "out")
    monkeypatch.undo()
    _assert_nothing_open(tmp_path / "out")


def _assert_nothing_open(folder: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        return
    opened = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if path.startswith(str(folder))]


def test_no_file_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", _refuse(errno.EMFILE))
    with pytest.raises(GrowkitError, match=r"'model\.safetensors'.*files open.*ulimit -n"):
        ShardWriter(tmp_path, plan_shards([], 1))


def test_close_makes_every_file_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
    )
    tensors = [OutputTensor(name, "U8", (4,)) for name in "ab"]
    writer = ShardWriter(tmp_path, plan_shards(tensors, 4))
    writer.close()
    assert sorted(synced) == sorted(path.name for path in tmp_path.iterdir())
    writer.close()
    assert len(synced) == 3


def test_an_exception_leaves_no_open_file(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        ShardWriter(tmp_path, plan_shards([OutputTensor("a", "U8", (4,))], 4)),
    ):
        raise KeyboardInterrupt
    _assert_nothing_open(tmp_path)


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(FileExistsError):
        ShardWriter(tmp_path, plan_shards([], 1))
    assert (tmp_path / "model.safetensors").read_text() == "precious"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
@pytest.mark.parametrize("kernel", [True, False])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, kernel: bool) -> None:
    """200 MB of one tensor are copied and read by a process that stays far below that."""
    (tmp_path / "out").mkdir()
    program = f"""
import os, re, sys
from pathlib import Path
from growkit.checkpoint import *
if not {kernel}:
    del os.copy_file_range
folder = Path(sys.argv[1])
plan = plan_shards([OutputTensor("a", "BF16", (100_000_000,))], 10**9)
ShardWriter(folder, plan).close()
(folder / "config.json").write_text("{{}}")
with open_checkpoint(folder) as source, ShardWriter(folder / "out", plan) as writer:
    info = source.tensors["a"]
    writer.copy("a", 0, source.descriptor(info.shard), info.start, info.nbytes)
    content_hash(source)
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
assert peak < 100_000, peak
assert not {{"torch", "transformers", "safetensors"}} & set(sys.modules)
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=root)
