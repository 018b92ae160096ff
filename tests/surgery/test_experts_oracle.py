"""Streamed growth of experts against growth in memory, bit for bit, and undone again."""

from __future__ import annotations

import re
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from expert_checkpoints import DENSE, LAYOUTS, SOURCES, source_folder, unstacked
from family_checkpoints import family_config, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shrink import shrink

from growkit.checkpoint import ShardWriter, open_checkpoint, plan_shards
from growkit.diff.folders import diff_checkpoints
from growkit.surgery import execute
from growkit.surgery.plan import build_plan
from growkit.surgery.request import GrowthRequest

# -- the oracle: straight from the algebra, no axis maps ------------------------------------------

FFN, HIDDEN, EXPERTS = 2, 2, 3


def _wider(name: str, array: tiny.Array) -> tiny.Array:
    """hidden x2 with even shares and FFN x2: one tensor of any layer, or outside them."""
    if array.ndim == 1:
        inside_heads = re.search(r"[qk]_norm|[qkv]_proj\.bias", name)
        return array if inside_heads else np.tile(array, HIDDEN)
    if re.search(r"embed_tokens|o_proj", name):
        return np.tile(array, (1, HIDDEN) if "embed" in name else (HIDDEN, 1))
    if re.search(r"\.w2\.|down_proj", name):
        return np.tile(array / FFN, (HIDDEN, FFN)).astype(array.dtype)
    rows = FFN if re.search(r"\.w[13]\.|gate_proj|up_proj", name) else 1
    return np.tile(array / HIDDEN, (rows, HIDDEN)).astype(array.dtype)


def more_experts(tensors: tiny.Tensors, experts: int) -> tiny.Tensors:
    """FFN and hidden twice as wide, every expert three times; experts in tensors of their own."""
    result: tiny.Tensors = {}
    for name, array in tensors.items():
        wider = _wider(name, array)
        if re.search(r"(mlp|moe)\.gate\.", name):
            result[name] = np.tile(wider, (EXPERTS, 1))
        elif match := re.search(r"\.experts\.(\d+)\.", name):
            for copy in range(EXPERTS):
                number = int(match[1]) + copy * experts
                result[name.replace(match[0], f".experts.{number}.")] = wider
        else:
            result[name] = wider
    return result


def assert_same(found: tiny.Tensors, expected: tiny.Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert tiny.same_bits(found[name], array), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["BF16", "F32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in SOURCES if "dense" not in name])
def test_streamed_growth_is_the_oracle(
    tmp_path: Path, name: str, layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small blocks, so that every matrix is read in several.
    monkeypatch.setattr("growkit.surgery.new_weights.BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(execute, "COPY_BYTES", 96)
    source = source_folder(tmp_path / "a", name, layout, dtype)
    tiny.grow(
        source, tmp_path / "b", experts="x3", ffn="x2", hidden="x2", symmetry="even", threads=2
    )
    config = tiny.read_config(source)
    old = unstacked(tiny.read_folder(source), config)
    expected = more_experts(old, 4)
    assert_same(unstacked(tiny.read_folder(tmp_path / "b"), config), expected)


@pytest.mark.parametrize("family", DENSE)
def test_upcycling_is_the_oracle(tmp_path: Path, family: str) -> None:
    source = source_folder(tmp_path / "a", family, dtype=torch.bfloat16)
    tiny.grow(source, tmp_path / "b", experts="5", ffn="x2", hidden="x2", symmetry="even")
    grown = tiny.read_folder(tmp_path / "b")
    expected: tiny.Tensors = {}
    for name, array in tiny.read_folder(source).items():
        wider = _wider(name, array)
        match = re.search(r"mlp\.(gate|up|down)_proj", name)
        if match is None:
            expected[name] = wider
            continue
        twin = {"gate": "w1", "up": "w3", "down": "w2"}[match[1]]
        to = "mlp.experts.{}." + match[0][4:]
        if family != "qwen3":
            to = f"block_sparse_moe.experts.{{}}.{twin}"
        expected |= {name.replace(match[0], to.format(e)): wider for e in range(5)}
    routers = {name for name in grown if re.search(r"(mlp|moe)\.gate\.weight", name)}
    assert len(routers) == 2
    assert_same({n: a for n, a in grown.items() if n not in routers}, expected)


# -- the inverse ----------------------------------------------------------------------------------


@st.composite
def requests(draw: st.DrawFn, name: str) -> dict[str, Any]:
    request: dict[str, Any] = {"seed": draw(st.integers(0, 3))}
    if name in DENSE:
        request["experts"] = draw(st.sampled_from(["2", "5"]))
    elif draw(st.booleans()):
        request["experts"] = draw(st.sampled_from(["x2", "x4", "+1"]))
    if draw(st.booleans()):
        request["ffn"] = draw(st.sampled_from(["x1.5", "x2"]))
        request["new_units"] = draw(st.sampled_from(["copy", "zero"]))
    if draw(st.booleans()):
        request["heads"] = "x2"
    if draw(st.booleans()):
        request["hidden"] = "x2"
    if "experts" not in request or draw(st.booleans()):
        request["layers"] = f"+{draw(st.integers(1, 3))}"
    return request


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(st.data())
def test_grow_then_shrink_returns_the_source(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*SOURCES, *DENSE]))
    layout = "separate" if name in DENSE else data.draw(st.sampled_from(LAYOUTS))
    request = data.draw(requests(name))
    with tempfile.TemporaryDirectory() as folder:
        # Four bytes an entry, so that x1.5 of 24 and 16 fit; bfloat16 is in the test above.
        source = source_folder(Path(folder) / "a", name, layout)
        plan = tiny.grow(source, Path(folder) / "b", **request)
        old, grown = tiny.read_folder(source), tiny.read_folder(Path(folder) / "b")
    back = shrink(plan, grown)
    assert_same(back, old)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shrinking_sees_a_lost_share(tmp_path: Path, layout: str) -> None:
    """The negative control: one entry of one copy."""
    source = source_folder(tmp_path / "a", "mixtral", layout, torch.bfloat16)
    plan = tiny.grow(source, tmp_path / "b", experts="x2")
    grown, old = tiny.read_folder(tmp_path / "b"), tiny.read_folder(source)
    assert_same(shrink(plan, grown), old)
    name = next(t for t in plan.tensors if t.share is not None).output.name
    grown[name][(0,) * grown[name].ndim] += 1
    back = shrink(plan, grown)
    assert sum((back[n] != old[n]).sum() for n in old) == 1


# -- streaming ------------------------------------------------------------------------------------


def test_a_stack_never_stands_in_memory(tmp_path: Path) -> None:
    """64 experts in one tensor of 34 MB: growth and diff hold a few of them at most."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 64}
    config = family_config("qwen3_moe", num_hidden_layers=1, **sizes)
    source = write_checkpoint(tmp_path / "a", config, fused=True)
    largest = max(array.nbytes for array in tiny.read_folder(source).values())
    assert largest >= 32 << 20
    tiny.grow(source, tmp_path / "b", experts="x2", threads=1)  # and imports
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "b") as b:
        plan = build_plan(a, GrowthRequest(experts="x2").operators())
        shards = plan_shards([tensor.output for tensor in plan.tensors], 1 << 40)
        (tmp_path / "c").mkdir()
        with ShardWriter(tmp_path / "c", shards) as writer:
            assert peak_of(lambda: execute.execute(plan, writer, threads=1)) < largest / 8
        assert peak_of(lambda: diff_checkpoints(a, b)) < largest / 2
        name = "model.layers.0.mlp.experts.gate_up_proj"
        assert peak_of(lambda: a.read(name)) >= largest  # a whole stack would be seen


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes that were held at most."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
