"""The benchmark of attention runs, and the FLOPs it predicts with are those that are computed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from flex_backend import uncompiled
from process_runs import run, script
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu  # noqa: E402
from attention_flops import work_of  # noqa: E402
from attention_layers import configs, inputs_of, layer_of, step  # noqa: E402

from growkit.variants.gda import attention as gda  # noqa: E402

CONFIGS = configs(8, 8)


@pytest.mark.parametrize("name", CONFIGS)
def test_closed_form_equals_the_counted_products(name):
    """With explicit maps, where every product of n x n is there to be counted."""
    config = CONFIGS[name]
    config._attn_implementation = "eager"
    layer = layer_of(config, "cpu", torch.float32)
    hidden, rotary = inputs_of(config, 16, "cpu", torch.float32)
    with FlopCounterMode(display=False) as counter:
        step(layer, hidden, rotary, "forward")
    work = work_of(config, 16, causal=False)
    assert counter.get_total_flops() == work.flops(backward=False)
    with FlopCounterMode(display=False) as counter:
        step(layer, hidden, rotary, "forward+backward")
    # explicit maps are kept, so no scores are computed again
    assert counter.get_total_flops() == 3 * work.flops(backward=False)


def test_halves_of_the_values_cost_the_scores_twice():
    config = CONFIGS["gda 3:1, own keys"]
    wide, halves = (work_of(config, 16, wide_values=wide) for wide in (True, False))
    assert halves.scores == 2 * wide.scores and halves.values == wide.values
    plain = CONFIGS["gqa"]
    assert work_of(plain, 16, wide_values=False) == work_of(plain, 16)


def test_all_paths_of_own_keys_compute_the_same(monkeypatch):
    config = CONFIGS["gda 3:1, own keys"]
    config._attn_implementation = "sdpa"
    layer = layer_of(config, "cpu", torch.float32)
    hidden, rotary = inputs_of(config, 300, "cpu", torch.float32)
    query = torch.empty(1, 1, 300, config.head_dim)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert gda.value_path("sdpa", query, query, None) == "blocks"
    outputs = {"blocks": layer(hidden, rotary)[0]}
    for path in ("halves", "wide"):
        monkeypatch.setattr(gda, "value_path", lambda *_, path=path: path)
        outputs[path] = layer(hidden, rotary)[0]
    for path in ("halves", "wide"):
        assert torch.allclose(outputs[path], outputs["blocks"], atol=1e-6)


def test_a_tiny_run_writes_every_variant(tmp_path):
    out = tmp_path / "result.json"
    command = [str(BENCHMARKS / "attention.py"), "--smoke", "--threads", "1"]
    run(1, [*command, "--out", str(out)], script)
    report = json.loads(out.read_text())
    rows = {(row["variant"], row["mode"]): row for row in report["rows"]}
    assert {name for name, _ in rows} > set(CONFIGS)
    assert any("one call with wide values" in name for name, _ in rows)
    assert all(len(row["seconds"]) == 1 and row["tokens"] == 32 for row in rows.values())
    assert rows["gqa", "forward"]["predicted"] == rows["gqa", "forward"]["ratio"] == 1
    assert report["machine"]["threads"] == 1


def test_the_script_for_a_gpu_writes_every_part(tmp_path):
    """Tiny and on the CPU, with flex_attention uncompiled; one JSON of all parts."""
    out = tmp_path / "gpu.json"
    with uncompiled():
        gpu.main(["--smoke", "--peak-flops", "1e12", "--json", str(out)])
    report = json.loads(out.read_text())
    assert [row["kind"] for row in report["training"]] == ["llama", "gda"]
    assert all(row["mfu"] > 0 for row in report["training"])
    rows = {(row["variant"], row["backend"], row["mode"]): row for row in report["attention"]}
    assert len(rows) == len(CONFIGS) * len(gpu.BACKENDS) * 2 and report["left out"] == []
    failed = {key: row["error"] for key, row in rows.items() if "error" in row}
    assert {backend for _, backend, _ in failed} <= {"flash"}, failed
    for (variant, *_), row in rows.items():
        assert "error" in row or row["median_s"] > 0
        if variant == "gqa":
            assert row["ratio"] == row["predicted"] == 1
