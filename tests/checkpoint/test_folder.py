"""Opening a folder: what it holds, and a clear sentence for every way in which it is damaged."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import entry, make_tensors, raw_file, write_index
from safetensors.numpy import save_file

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import CheckpointError, UsageError

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
Make = Callable[..., Path]


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_every_tensor(make_checkpoint: Make, sharded: bool) -> None:
    with open_checkpoint(make_checkpoint(sharded=sharded)) as checkpoint:
        expected = make_tensors()
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.shards == ((FIRST, SECOND) if sharded else ("model.safetensors",))
        assert checkpoint.tensors.keys() == expected.keys()
        assert checkpoint.total_size == sum(tensor.nbytes for tensor in expected.values())
        for name, tensor in expected.items():
            array = checkpoint.read(name)
            assert array.dtype == tensor.dtype
            assert array.shape == tensor.shape
            assert array.tobytes() == tensor.tobytes()
            array[...] = 0  # a fresh copy: writable, and not the file


def test_reads_parts_into_any_buffer(make_checkpoint: Make) -> None:
    with open_checkpoint(make_checkpoint()) as checkpoint:
        name = "model.layers.0.weight"
        content = checkpoint.read(name).tobytes()
        part = bytearray(10)
        checkpoint.read_into(name, memoryview(part), 3)
        assert bytes(part) == content[3:13]
        rows = np.empty((2, 4), np.float32)
        checkpoint.read_into(name, rows, 16)
        assert rows.tobytes() == content[16:48]
        checkpoint.read_into("empty", bytearray(), 0)
        with pytest.raises(ValueError, match="not inside"):
            checkpoint.read_into(name, part, len(content) - 9)
        with pytest.raises(ValueError, match="not inside"):
            checkpoint.read_into(name, part, -1)
        with pytest.raises(ValueError, match="not contiguous"):
            checkpoint.read_into(name, np.empty((4, 2), np.float32).T, 0)


def test_unknown_tensor_names_the_nearest(make_checkpoint: Make) -> None:
    with open_checkpoint(make_checkpoint()) as checkpoint:
        with pytest.raises(CheckpointError, match=r"model\.layers\.2.*Did you mean 'model\.layers"):
            checkpoint.read("model.layers.2.weight")
        with pytest.raises(ValueError, match="not a shard"):
            checkpoint.descriptor("../config.json")


def test_packed_types_are_listed_but_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    raw_file(tmp_path / "model.safetensors", {"a": entry("F4", [3, 4], [0, 6])}, bytes(6))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["a"].nbytes == 6
        with pytest.raises(CheckpointError, match=r"'a'.*F4.*only be copied"):
            checkpoint.read("a")


def test_threads_share_one_descriptor(make_checkpoint: Make) -> None:
    with open_checkpoint(make_checkpoint()) as checkpoint:
        found: list[int] = []
        barrier = threading.Barrier(8)

        def work() -> None:
            barrier.wait()
            found.append(checkpoint.descriptor("model.safetensors"))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8
        assert len(set(found)) == 1


def test_file_cut_after_opening(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    with open_checkpoint(folder) as checkpoint:
        with open(folder / "model.safetensors", "r+b") as file:
            file.truncate(checkpoint.tensors["fp8"].start)
        with pytest.raises(CheckpointError, match=r"'model\.safetensors'.*'fp8'.*changed"):
            checkpoint.read("fp8")


def test_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    checkpoint = open_checkpoint(tmp_path, require_tensors=False)
    assert (checkpoint.config, checkpoint.tensors) == ({"hidden_size": 8}, {})
    with pytest.raises(UsageError, match="no weights"):
        open_checkpoint(tmp_path)


def test_not_a_folder(make_checkpoint: Make, tmp_path: Path) -> None:
    make_checkpoint("source")
    with pytest.raises(UsageError, match=r"no folder.*Did you mean 'source'.*Hub id"):
        open_checkpoint(tmp_path / "sorce")
    with pytest.raises(UsageError, match="a file, not a folder"):
        open_checkpoint(tmp_path / "source" / "config.json")


def test_no_config(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"no config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "not a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "' + b" " * 17_000_000 + b'"}', "larger than"),
    ],
    ids=["list", "cut", "no text", "duplicate", "deep", "huge number", "large"],
)
def test_bad_config(make_checkpoint: Make, content: bytes, message: str) -> None:
    folder = make_checkpoint()
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"'{folder}/config\.json'.*{message}"):
        open_checkpoint(folder)


def test_missing_shard(make_checkpoint: Make) -> None:
    folder = make_checkpoint(sharded=True)
    (folder / SECOND).unlink()
    with pytest.raises(CheckpointError, match=SECOND):
        open_checkpoint(folder)


def test_truncated_shard(make_checkpoint: Make) -> None:
    folder = make_checkpoint(sharded=True)
    with open(folder / SECOND, "r+b") as file:
        file.truncate((folder / SECOND).stat().st_size - 1)
    with pytest.raises(CheckpointError, match=rf"{SECOND}.*truncated"):
        open_checkpoint(folder)


def test_shards_without_index(make_checkpoint: Make) -> None:
    folder = make_checkpoint(sharded=True)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{FIRST}.*no model\.safetensors\.index\.json"):
        open_checkpoint(folder)


def test_stale_single_file_beside_shards(make_checkpoint: Make) -> None:
    """transformers would load the stale file under the new config without an error."""
    folder = make_checkpoint(sharded=True)
    save_file({"a": np.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.safetensors'.*index\.json"):
        open_checkpoint(folder)


def test_stale_shard_beside_single_file(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    save_file({"a": np.zeros(1)}, folder / FIRST)
    with pytest.raises(CheckpointError, match=rf"'model\.safetensors'.*{FIRST}"):
        open_checkpoint(folder)


def test_stale_shard_beside_shards(make_checkpoint: Make) -> None:
    folder = make_checkpoint(sharded=True)
    save_file({"a": np.zeros(1)}, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="model-00003-of-00003"):
        open_checkpoint(folder)


def test_other_safetensors_files_are_no_part_of_the_model(make_checkpoint: Make) -> None:
    folder = make_checkpoint(sharded=True)
    save_file({"a": np.zeros(1)}, folder / "adapter_model.safetensors")
    assert "a" not in open_checkpoint(folder).tensors


def test_index_of_one_file(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    write_index(folder, dict.fromkeys(make_tensors(), "model.safetensors"))
    assert open_checkpoint(folder).shards == ("model.safetensors",)


def _change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    change(weight_map)
    write_index(folder, weight_map)


def test_index_names_a_tensor_that_its_shard_lacks(make_checkpoint: Make) -> None:
    folder = make_checkpoint(sharded=True)
    _change_index(folder, lambda weights: weights.update(ghost=FIRST))
    with pytest.raises(CheckpointError, match=rf"'ghost' in '{FIRST}'"):
        open_checkpoint(folder)


def test_shard_has_a_tensor_that_the_index_lacks(make_checkpoint: Make) -> None:
    folder = make_checkpoint(sharded=True)
    _change_index(folder, lambda weights: weights.pop("fp8"))
    with pytest.raises(CheckpointError, match=rf"{SECOND}.*'fp8'"):
        open_checkpoint(folder)


def test_tensor_in_two_shards(make_checkpoint: Make) -> None:
    folder = make_checkpoint(sharded=True)
    save_file({"bias": np.zeros(1)}, folder / SECOND)
    with pytest.raises(CheckpointError, match=rf"'bias' is in two shards.*{FIRST}.*{SECOND}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/model.safetensors",
        "..\\secret.safetensors",
        "C:secret.safetensors",
        ".hidden.safetensors",
        "a\x00.safetensors",
        "..",
        "",
        "pytorch_model.bin",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_index_leads_out_of_the_folder(make_checkpoint: Make, shard: Any) -> None:
    folder = make_checkpoint("source", sharded=True)
    save_file({"bias": np.zeros(1)}, folder.parent / "secret.safetensors")
    _change_index(folder, lambda weights: weights.update(bias=shard))
    with pytest.raises(CheckpointError, match=r"index\.json' puts tensor 'bias' into"):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_index_without_weight_map(make_checkpoint: Make, weight_map: Any) -> None:
    folder = make_checkpoint(sharded=True)
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(folder)


def test_links_as_in_a_download_cache(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint("blobs")
    snapshot = tmp_path / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert open_checkpoint(snapshot).tensors.keys() == make_tensors().keys()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_a_trillion_parameters_in_bounded_memory(tmp_path: Path) -> None:
    """200 sparse shards of 5 billion parameters: only headers are read, and nothing is imported
    that growing does not need."""
    (tmp_path / "config.json").write_text("{}")
    weight_map = {}
    for number in range(1, 201):
        shard = f"model-{number:05d}-of-00200.safetensors"
        header, size = {}, 2 * 250_000_000
        for index in range(20):
            name = f"model.layers.{number}.weight.{index}"
            header[name] = entry("BF16", [25_000, 10_000], [index * size, (index + 1) * size])
            weight_map[name] = shard
        with open(raw_file(tmp_path / shard, header), "r+b") as file:
            file.seek(20 * size, 2)
            file.truncate()
    write_index(tmp_path, weight_map)
    program = """
import re, sys
from pathlib import Path
from growkit.checkpoint import open_checkpoint
checkpoint = open_checkpoint(Path(sys.argv[1]))
assert checkpoint.total_size == 2_000_000_000_000
assert len(checkpoint.tensors) == 4000
assert not {"torch", "transformers", "safetensors"} & set(sys.modules)
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
assert peak < 80_000, peak
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=root)
