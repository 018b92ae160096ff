"""Growth streams: no tensor of 200 MB, computed or copied, stands in memory; zeros are holes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_checkpoints as tiny

from growkit.checkpoint import OutputTensor, ShardWriter, open_checkpoint, plan_shards

LIMIT_MB = 60
# Prints how much the largest resident set rose during the work, in MB. VmHWM belongs to this
# process alone; getrusage would begin at the peak of the process that started it.
CHILD = """
import sys
from pathlib import Path
from growkit.checkpoint import open_checkpoint
from growkit.growing import grow_checkpoint
from growkit.surgery.request import GrowthRequest

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

source, out, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
before = peak()
if how == "read":
    with open_checkpoint(source) as checkpoint:
        checkpoint.read("model.layers.0.self_attn.o_proj.weight")
else:
    field, value = how.split("=")
    grow_checkpoint(source, out, GrowthRequest(**{field: value}), verify=False, threads=2)
print(peak() - before)
"""

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc/self/status"
)


O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer whose o_proj has 201 MB; its zeros are holes, so it takes no room."""
    config = tiny.gda_config(
        96, 32, 4, num_hidden_layers=1, hidden_size=1024, head_dim=512, lambda_init=[0.5]
    )
    folder = tmp_path_factory.mktemp("large") / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    tensors = [
        OutputTensor(name, "F32" if "lambda" in name else "BF16", shape)
        for name, shape in tiny.shapes(config).items()
    ]
    with ShardWriter(folder, plan_shards(tensors, 1 << 40)):
        pass
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors[O_PROJ].nbytes > 200_000_000
    return folder


def memory_rise(source: Path, out: Path, how: str) -> float:
    command = [sys.executable, "-c", CHILD, str(source), str(out), how]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@needs_proc
@pytest.mark.parametrize("growth", ["signal_heads=x2", "layers=+1"])
def test_memory_does_not_grow_with_the_tensor(large: Path, tmp_path: Path, growth: str) -> None:
    assert memory_rise(large, tmp_path / "out", growth) < LIMIT_MB
    with open_checkpoint(tmp_path / "out") as grown:
        assert grown.total_size > 480_000_000


@needs_proc
def test_a_tensor_in_memory_would_be_seen(large: Path, tmp_path: Path) -> None:
    """The negative control: reading the tensor as a whole shows in the same figure."""
    assert memory_rise(large, tmp_path / "out", "read") > 2 * LIMIT_MB


def allocated(folder: Path) -> int:
    """Bytes on disk of the weights."""
    return sum(512 * file.stat().st_blocks for file in folder.glob("*.safetensors"))


def test_zero_tensors_are_holes(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    with probe.open("wb") as file:
        file.truncate(1 << 20)
    if probe.stat().st_blocks * 512 >= 1 << 20:
        pytest.skip("this file system has no holes")
    config = tiny.llama_config(hidden_size=256, intermediate_size=2048, head_dim=64)
    source = tiny.make_folder(tmp_path / "source", config)
    plan = tiny.grow(source, tmp_path / "grown", layers="+4")
    zeros = [tensor.output.shape for tensor in plan.tensors if tensor.action == "zero"]
    hole_bytes = sum(4 * rows * columns for rows, columns in zeros)
    assert len(zeros) == 8
    assert allocated(tmp_path / "grown") < plan.total_bytes - 0.9 * hole_bytes
    # The same measure sees no holes in the source, whose tensors are all stored.
    with open_checkpoint(source) as checkpoint:
        assert allocated(source) >= checkpoint.total_size
    grown = tiny.read_folder(tmp_path / "grown")
    for tensor in plan.tensors:
        if tensor.action == "zero":
            assert not grown[tensor.output.name].any()
