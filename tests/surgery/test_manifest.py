"""growkit.json, the block in config.json and the model card."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny

from growkit.growing import grow_checkpoint
from growkit.record.manifest import read_manifest
from growkit.surgery.request import GrowthRequest


def manifest_of(folder: Path) -> dict[str, Any]:
    content = read_manifest(folder)
    assert content is not None
    return content


def old_part(array: tiny.Array, new: Any) -> tiny.Array:
    """What is left when the new rows and columns are taken away."""
    for axis, key in enumerate(("rows", "columns")):
        keep = np.ones(array.shape[axis] if axis < array.ndim else 0, bool)
        for start, end in new.get(key, []):
            assert 0 <= start < end <= len(keep)
            keep[start:end] = False
        if axis < array.ndim:
            array = np.compress(keep, array, axis)
    return array


REQUESTS: dict[str, tuple[tiny.Config, dict[str, Any]]] = {
    "signal": (tiny.gda_config(4, 2, 1), {"signal_heads": "x2"}),
    "signal-zero": (tiny.gda_config(4, 2, 1), {"signal_heads": "+4", "new_heads": "zero"}),
    "noise": (tiny.gda_config(8, 2, 2), {"noise_heads": "x2"}),
    "uniform": (tiny.gda_config(4, 4, 2), {"uniform_heads": "x1.5"}),
    "ffn": (tiny.llama_config(mlp_bias=True), {"ffn": "+5"}),
    "ffn-zero": (tiny.llama_config(mlp_bias=True), {"ffn": "+5", "new_units": "zero"}),
    "hidden": (tiny.gda_config(tie_word_embeddings=True), {"hidden": "x2"}),
    "all": (tiny.gda_config(), {"signal_heads": "x3", "ffn": "+1", "hidden": "x2", "layers": "+1"}),
    "diffllama": (tiny.diffllama_config(), {"signal_heads": "x2"}),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_new_parameters_are_what_has_no_old_counterpart(tmp_path: Path, case: str) -> None:
    config, request = REQUESTS[case]
    source = tiny.make_folder(tmp_path / "a", config, "BF16")
    plan = tiny.grow(source, tmp_path / "b", symmetry="even", **request)
    old, grown = tiny.read_folder(source), tiny.read_folder(tmp_path / "b")
    new = manifest_of(tmp_path / "b")["new_parameters"]
    assert new and new.keys() <= grown.keys()
    for tensor in plan.tensors:
        name, array = tensor.output.name, grown[tensor.output.name]
        if new.get(name) == "all":
            inserted = tensor.layer is not None and plan.growth.layers[tensor.layer].kind != "kept"
            assert inserted or tensor.source is None
            continue
        assert tensor.source is not None
        rest = old_part(array, new.get(name, {}))
        before = old[tensor.source]
        assert rest.shape == before.shape, name
        shared = any(d is not None and d.shares for d in tensor.dims) or tensor.factor != 1
        if not shared:
            # Stripes may put the old rows into another order; none is lost or doubled.
            assert sorted(row.tobytes() for row in rest) == sorted(r.tobytes() for r in before)


def test_ranges_are_written_out(tmp_path: Path) -> None:
    """Groups of two signal heads and a noise head, head_dim 4: the second copy of each is new."""
    tiny.make_folder(tmp_path / "a", tiny.gda_config(4, 2, 1))
    tiny.grow(tmp_path / "a", tmp_path / "b", signal_heads="x2", layers="+1", layer_placement="end")
    new = manifest_of(tmp_path / "b")["new_parameters"]
    at = "model.layers.0.self_attn."
    assert new[at + "q_proj.weight"] == {"rows": [[4, 8], [12, 16], [24, 28], [32, 36]]}
    assert new[at + "o_proj.weight"] == {"columns": [[8, 16], [24, 32], [40, 48], [56, 64]]}
    assert at + "k_proj.weight" not in new and "lm_head.weight" not in new
    inserted = {name for name, part in new.items() if part == "all"}
    assert inserted == {n for n in tiny.read_folder(tmp_path / "b") if "layers.2." in n}


def test_parent_is_identified(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", tiny.gda_config())
    tiny.grow(source, tmp_path / "b", signal_heads="x2")
    parent = manifest_of(tmp_path / "b")["parent"]
    assert parent["name"] == "a"
    assert (
        parent["config_sha256"] == hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
    )
    assert parent["content_sha256"] is None
    hashes = []
    for seed in (0, 0, 1):
        folder = tiny.make_folder(tmp_path / f"s{len(hashes)}", tiny.gda_config(), seed=seed)
        request = GrowthRequest(layers="+1")
        _, manifest = grow_checkpoint(
            folder, tmp_path / f"g{len(hashes)}", request, verify=False, hash_content=True
        )
        hashes.append(manifest["parent"])
    assert hashes[0]["content_sha256"] == hashes[1]["content_sha256"] != hashes[2]["content_sha256"]
    assert hashes[0]["headers_sha256"] == hashes[2]["headers_sha256"]


def test_lineage_over_three_growths(tmp_path: Path) -> None:
    tiny.make_folder(tmp_path / "first", tiny.gda_config(4, 2, 1))
    steps = {"second": {"signal_heads": "x2"}, "third": {"layers": "+1"}, "fourth": {"ffn": "+1"}}
    before = "first"
    for name, request in steps.items():
        tiny.grow(tmp_path / before, tmp_path / name, **request)
        before = name
    manifest = manifest_of(tmp_path / "fourth")
    assert [entry["parent"]["name"] for entry in manifest["lineage"]] == ["first", "second"]
    assert [entry["request"] for entry in manifest["lineage"]] == [*steps.values()][:2]
    assert manifest["parent"]["name"] == "third" and manifest["request"] == steps["fourth"]
    assert tiny.read_config(tmp_path / "fourth")["growkit"]["growths"] == 3
    assert manifest_of(tmp_path / "second")["lineage"] == []


def test_a_damaged_manifest_of_the_source_does_not_stop_a_growth(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", tiny.gda_config())
    (source / "growkit.json").write_text("{not json")
    tiny.grow(source, tmp_path / "b", layers="+1")
    assert manifest_of(tmp_path / "b")["lineage"] == []


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    """With verification, whose report knows both folders."""
    source = tiny.make_folder(tmp_path / "a", tiny.gda_config())
    tiny.grow(source, tmp_path / "b", signal_heads="x2", verify=True)
    for file in ("growkit.json", "config.json", "README.md"):
        text = (tmp_path / "b" / file).read_text()
        assert str(tmp_path) not in text and "/tmp" not in text and ".partial" not in text
    proof = manifest_of(tmp_path / "b")["verification"]
    assert proof["passed"] is True
    assert proof["summary"] in (tmp_path / "b" / "README.md").read_text()


def test_the_card_has_the_table_and_says_when_nothing_was_proven(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", tiny.gda_config(4, 2, 1))
    (source / "README.md").write_text(
        "---\nlicense: mit\nbase_model: some/model\npipeline_tag: x\n---\n# Old text\n"
    )
    tiny.grow(source, tmp_path / "b", signal_heads="x2", symmetry="even")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "| signal heads | 4 | 8 |" in card
    assert "| noise heads | 2 | 2 |" in card
    figures = manifest_of(tmp_path / "b")["plan"]
    counts = [f"{figures[side]['parameters']:,}" for side in ("before", "after")]
    assert f"| parameters | {counts[0]} | {counts[1]} |" in card
    assert "Not verified" in card
    assert "license: mit" in card and "Old text" not in card
    assert "equal for ever" in card
    assert "signal_heads: x2" in card


def test_the_source_is_only_read(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", tiny.gda_config(), shards=2)
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in source.iterdir()}
    tiny.grow(source, tmp_path / "b", signal_heads="x2", hidden="x2", layers="+1")
    after = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in source.iterdir()}
    assert before == after
