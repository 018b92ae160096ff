"""Folders as torch distributed checkpoints and back; names and rows as torchtitan has them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from family_checkpoints import family_config, write_checkpoint
from grown_runs import grow
from safetensors.torch import load_file

from growkit.cli.main import main
from growkit.core.errors import CheckpointError, UsageError
from growkit.training.parallel.dcp_folder import export_dcp, import_dcp


def grown(kind: str, folder: Path, **changes: Any) -> Path:
    """A tiny model grown in heads and layers, in bfloat16."""
    write_checkpoint(folder / "source", family_config(kind, num_hidden_layers=1, **changes))
    return grow(folder / "source", folder / "grown", heads="x2", layers="+1")


def read(folder: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By torch's own loader, in one process."""
    target = {name: torch.full_like(value, torch.nan) for name, value in like.items()}
    dcp.load(target, checkpoint_id=folder, no_dist=True)
    return target


@pytest.mark.parametrize("names", ["transformers", "torchtitan"])
def test_out_and_in_again(names: str, tmp_path: Path) -> None:
    folder = grown("llama", tmp_path)
    words = ["export", str(folder), "--to", "dcp", "--names", names, "--quiet"]
    assert main([*words, "--out", str(tmp_path / "dcp")]) == 0
    back = ["export", str(tmp_path / "dcp"), "--to", "safetensors", "--like", str(folder)]
    assert main([*back, "--out", str(tmp_path / "back"), "--quiet"]) == 0
    stored = load_file(folder / "model.safetensors")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert stored.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in stored.items())
    assert (tmp_path / "back" / "growkit.json").read_bytes() == (
        folder / "growkit.json"
    ).read_bytes()
    if names == "transformers":
        loaded = read(tmp_path / "dcp", stored)
        assert all(torch.equal(value, loaded[name]) for name, value in stored.items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_torchtitan_reads_it(kind: str, tied: bool, tmp_path: Path) -> None:
    """Its own adapter is the oracle, both ways."""
    model = {"llama": "llama3", "qwen3": "qwen3"}[kind]
    # Without triton, which CPU builds of torch do not bring, its models cannot be imported.
    module = pytest.importorskip(f"torchtitan.models.{model}.state_dict_adapter")
    Adapter = getattr(module, f"{model.capitalize()}StateDictAdapter")
    from torchtitan.models.common.rope import ComplexRoPE, CosSinRoPE

    folder = grown(kind, tmp_path, tie_word_embeddings=tied)
    attention = SimpleNamespace(
        n_heads=8,
        n_kv_heads=4,
        head_dim=8,
        rope=(ComplexRoPE if kind == "llama" else CosSinRoPE).Config(dim=8, max_seq_len=512),
    )
    layers = [SimpleNamespace(attention=attention, moe=None)] * 2
    sizes = SimpleNamespace(layers=layers, dim=32, enable_weight_tying=tied)
    stored = load_file(folder / "model.safetensors")
    expected = Adapter(sizes, None).from_hf(dict(stored))
    export_dcp(folder, tmp_path / "dcp", names="torchtitan")
    loaded = read(tmp_path / "dcp", expected)
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())
    back = Adapter(sizes, None).to_hf(loaded)
    assert all(torch.equal(value, back[name]) for name, value in stored.items())


def test_what_cannot_be_exported_or_read(tmp_path: Path, capsys: Any) -> None:
    folder = grown("llama", tmp_path)
    write_checkpoint(tmp_path / "other", family_config("mixtral", num_hidden_layers=1))
    with pytest.raises(UsageError, match="known of llama and qwen3, and this is a mixtral"):
        export_dcp(tmp_path / "other", tmp_path / "out", names="torchtitan")
    export_dcp(folder, tmp_path / "dcp")
    with pytest.raises(CheckpointError, match=r"lacks 'model\.layers\.0\..*experts\.0\.w1"):
        import_dcp(tmp_path / "dcp", tmp_path / "out", tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"is \[32, 32\] in .* \[16, 32\] in"):
        import_dcp(tmp_path / "dcp", tmp_path / "out", tmp_path / "source")
    with pytest.raises(UsageError, match="holds no torch distributed checkpoint"):
        import_dcp(folder, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()
    for words, said in (
        (["--to", "gguf"], "is no export"),
        (["--to", "dcp", "--fold"], "two exports"),
        (["--to", "dcp", "--names", "jax"], "is not known"),
        (["--to", "safetensors"], "Give --like FOLDER"),
    ):
        assert main(["export", str(folder), "--out", str(tmp_path / "out"), *words]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = grown("llama", tmp_path)
    monkeypatch.setattr("growkit.training.parallel.dcp_folder.copy_side_files", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_dcp(folder, tmp_path / "dcp")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "grown"}
