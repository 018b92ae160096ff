"""What ``growkit diff`` says of grown folders and of any two; and that it looks at the bytes."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny

from growkit.checkpoint import open_checkpoint
from growkit.cli.main import main
from growkit.core.errors import UsageError
from growkit.diff.folders import diff_checkpoints
from growkit.diff.groups import span

LLAMA = tiny.llama_config(4, 2, num_hidden_layers=3, attention_bias=True)
TIED = tiny.llama_config(4, 2, tie_word_embeddings=True)


def diff(a: Path, b: Path) -> dict[str, Any]:
    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        return diff_checkpoints(first, second)


def texts(report: dict[str, Any]) -> dict[str, list[tuple[list[int], str]]]:
    """Tensor -> (layers, text) of each of its groups."""
    result: dict[str, list[tuple[list[int], str]]] = {}
    for group in report["groups"]:
        name = group["tensor"].split("{layer}.")[-1].removesuffix(".weight")
        result.setdefault(name, []).append((group["layers"], group["text"]))
    return result


def rewrite(folder: Path, name: str, change: Any) -> Path:
    """The folder with one tensor changed, manifest and all."""
    tensors = tiny.read_folder(folder)
    change(tensors[name])
    other = folder.with_name(folder.name + "-changed")
    tiny.write_folder(other, tiny.read_config(folder), tensors)
    (other / "growkit.json").write_bytes((folder / "growkit.json").read_bytes())
    return other


GROWTHS: dict[str, tuple[tiny.Config, dict[str, Any]]] = {
    "llama": (LLAMA, {"heads": "x2", "ffn": "+7", "hidden": "x2", "layers": "+2"}),
    "zero parts": (
        LLAMA,
        {"query_heads": "x2", "ffn": "+5", "new_heads": "zero", "new_units": "zero"},
    ),
    "tied": (TIED, {"hidden": "x2"}),
    "untied": (TIED, {"untie_embeddings": True, "hidden": "x3", "kv_heads": "x2"}),
    "gda": (tiny.gda_config(4, 2), {"signal_heads": "x2", "noise_heads": "x2", "layers": "+1"}),
    "lambda": (tiny.gda_config(4, 4), {"noise_heads": "x2"}),
    "converted": (tiny.diffllama_config(8, 4), {"signal_heads": "x2", "layers": "+1"}),
    "motif": (tiny.motif_config(), {"uniform_heads": "x2", "layers": "4", "hidden": "x2"}),
    "stacked": (LLAMA, {"layers": "x2", "depth_method": "stack"}),
    "noise": (LLAMA, {"ffn": "x3", "symmetry": "noise"}),
}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("case", GROWTHS)
def test_a_grown_folder_is_what_its_plan_says(tmp_path: Path, case: str, dtype: str) -> None:
    config, request = GROWTHS[case]
    source = tiny.make_folder(tmp_path / "a", config, dtype, shards=2)
    tiny.grow(source, tmp_path / "b", max_shard_size="5KB", **request)
    report = diff(source, tmp_path / "b")
    assert report["mode"] == "growth" and report["as_grown"] and not report["notes"]
    for group in report["groups"]:
        if request.get("symmetry") != "noise":
            assert group["differing"] == 0, group


def test_a_growth_is_explained(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", LLAMA, "BF16")
    tiny.grow(source, tmp_path / "b", query_heads="x2", ffn="x1.5", layers="+1")
    found = texts(diff(source, tmp_path / "b"))
    kept, inserted = [0, 1, 2], [3]
    assert found["model.embed_tokens"] == [([], "unchanged")]
    assert found["self_attn.k_proj"] == [(kept, "unchanged"), (inserted, "unchanged")]
    assert found["self_attn.q_proj"][0] == (
        kept,
        "rows 0-3, 8-11, 16-19, 24-27 unchanged, 4-7, 12-15, 20-23, 28-31 copies",
    )
    layers, text = found["self_attn.o_proj"][0]
    assert layers == kept
    assert "columns 0-3, 8-11, 16-19, 24-27 and copies 4-7, 12-15, 20-23, 28-31 divide" in text
    assert "share mean 0.5" in text or "share mean 0.4" in text
    assert "sum exact" in text
    assert found["self_attn.o_proj"][1] == (inserted, "zero, so the block adds nothing")
    assert found["mlp.gate_proj"][0][1] == (
        "rows 0, 2-3, 5-6, ... (7 ranges) unchanged, 1, 4, 7, ... (6 ranges) copies"
    )


def test_hidden_growth_of_a_tied_model(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", TIED)
    tiny.grow(source, tmp_path / "b", hidden="x2")
    report = diff(source, tmp_path / "b")
    found = texts(report)
    assert found["model.norm"] == [([], "entries 0-15 old, 16-31 copies; multiplied by 0.5")]
    assert found["model.embed_tokens"] == [([], "columns 0-15 unchanged, 16-31 copies")]
    (group,) = (g for g in report["groups"] if g["tensor"].endswith("q_proj.weight"))
    shares = group["shares"]["2"]
    assert sum(shares) == pytest.approx(1) and all(0.4 < share < 0.6 for share in shares)
    assert group["columns"] == {"shared": True, "old": [(0, 16)], "copies": [(16, 32)]}


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("model.embed_tokens.weight", 200, 3),  # copied
        ("model.layers.2.self_attn.q_proj.weight", 5, 0),  # a copy of a producer
        ("model.layers.0.mlp.down_proj.weight", 0, 17),  # a share
        ("model.layers.3.self_attn.o_proj.weight", 15, 31),  # a zero of an inserted block
    ],
)
def test_one_changed_bit_is_found(tmp_path: Path, name: str, row: int, column: int) -> None:
    """The negative control: the plan alone would say that all is well."""
    source = tiny.make_folder(tmp_path / "a", LLAMA, "BF16")
    tiny.grow(source, tmp_path / "b", query_heads="x2", ffn="x1.5", layers="+1")

    def flip(tensor: tiny.Array) -> None:
        tensor.view(np.uint16)[row, column] ^= 1

    report = diff(source, rewrite(tmp_path / "b", name, flip))
    assert report["as_grown"] is False
    (changed,) = (group for group in report["groups"] if group["differing"])
    assert changed["differing"] == 1
    assert changed["tensor"] == name.replace("layers." + name.split(".")[2], "layers.{layer}")
    if "{layer}" in changed["tensor"]:
        assert changed["layers"] == [int(name.split(".")[2])]


def test_nan_in_a_grown_folder_is_a_change(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", LLAMA)
    tiny.grow(source, tmp_path / "b", ffn="x2")

    def spoil(tensor: tiny.Array) -> None:
        tensor[3, 4] = np.nan

    report = diff(source, rewrite(tmp_path / "b", "model.layers.0.mlp.down_proj.weight", spoil))
    assert report["as_grown"] is False


# -- without a plan -------------------------------------------------------------------------------


def test_two_folders_without_a_manifest(tmp_path: Path) -> None:
    a = tiny.make_folder(tmp_path / "a", LLAMA)
    tensors = tiny.read_folder(a)
    tensors["model.layers.1.mlp.up_proj.weight"][0, :8] += 0.5
    tensors["model.norm.weight"] = np.ones(16, np.float32).astype(tiny.NUMPY["F16"])
    del tensors["model.layers.2.self_attn.q_proj.bias"]
    tensors["model.extra.weight"] = np.zeros((2, 2), np.float32)
    b = tiny.write_folder(tmp_path / "b", LLAMA, tensors)
    report = diff(a, b)
    assert report["mode"] == "tensors" and report["identical"] is False
    found = texts(report)
    assert found["mlp.up_proj"] == [
        ([0, 2], "unchanged"),
        ([1], "4.167% of entries changed, max |d| 0.5"),
    ]
    assert found["model.norm"][0][1].startswith("100.000% of entries changed")
    assert found["self_attn.q_proj.bias"] == [([0, 1], "unchanged"), ([2], "only in A")]
    assert found["model.extra"] == [([], "only in B")]


def test_identical_folders_and_other_dtypes(tmp_path: Path) -> None:
    a = tiny.make_folder(tmp_path / "a", LLAMA, "BF16")
    wide = {name: tensor.astype(np.float32) for name, tensor in tiny.read_folder(a).items()}
    b = tiny.write_folder(tmp_path / "b", LLAMA, wide, shards=3)
    assert diff(a, a)["identical"] and diff(a, b)["identical"]


def test_sizes_that_differ(tmp_path: Path) -> None:
    a = tiny.make_folder(tmp_path / "a", LLAMA)
    b = tiny.make_folder(tmp_path / "b", LLAMA | {"intermediate_size": 20})
    assert texts(diff(a, b))["mlp.gate_proj"] == [([0, 1, 2], "shape [12, 16] in A, [20, 16] in B")]


def test_a_parent_that_is_another_is_named(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", LLAMA)
    tiny.grow(source, tmp_path / "b", layers="+1")
    other = tiny.make_folder(tmp_path / "c", LLAMA | {"rms_norm_eps": 1e-5})
    assert "grown from 'a'" in diff(other, tmp_path / "b")["notes"][0]
    assert "other order" in diff(tmp_path / "b", source)["notes"][0]


def test_two_families_are_refused(tmp_path: Path) -> None:
    a = tiny.make_folder(tmp_path / "a", LLAMA)
    b = tiny.make_folder(tmp_path / "b", tiny.gda_config())
    with pytest.raises(UsageError, match="'llama' and B a 'gda'"):
        diff(a, b)


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    config = LLAMA | {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 4096}
    config |= {"num_hidden_layers": 1}
    source = tiny.make_folder(tmp_path / "a", config)
    tiny.grow(source, tmp_path / "b", ffn="x2", hidden="x2")
    diff(source, source)  # imports
    tracemalloc.start()
    assert diff(source, tmp_path / "b")["as_grown"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(tensor.nbytes for tensor in tiny.read_folder(tmp_path / "b").values())
    assert largest >= 32 << 20
    assert peak < largest / 2


def test_the_command_prints_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.make_folder(tmp_path / "a", LLAMA)
    tiny.grow(source, tmp_path / "b", ffn="x2")
    assert main(["diff", str(source), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "every part is what its plan says" in shown and "growth: FFN width 12 -> 24" in shown
    assert main(["diff", str(source), str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["as_grown"] is True
    assert main(["diff", str(source), str(tmp_path / "none")]) == 2


def test_spans() -> None:
    assert span([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"
    assert span(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, ... (20 ranges)"
    assert span([]) == ""
