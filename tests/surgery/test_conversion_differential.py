"""DIFF V1, DiffLlama, Motif and GDA with own keys are one model in four orders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from converted import LAYERS, allowed, convert, difference, logits
from growth_matrix import logits_of
from variant_checkpoints import write_variant

from growkit.cli.main import main
from growkit.variants.diffllama import convert as differential
from growkit.verification.loading import register_own_models

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "head_dim": 8}


@pytest.fixture(autouse=True)
def _own_models() -> None:
    register_own_models()


def write_source(path: Path, name: str, dtype: str = "F32") -> Path:
    """4 pairs of heads on 2 key/value pairs, with a gain and a lambda that differ by layer."""
    if name == "diff_v1":
        kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
        extras = dict.fromkeys(("qk_norm", "attention_bias", "attention_output_bias"), False)
        return write_variant(path, name, kind, num_hidden_layers=LAYERS, **extras)
    if name in ("diff_v1 extras", "diff_v1-plain"):
        kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
        return write_variant(path, name.split()[0], kind, num_hidden_layers=LAYERS)
    made = {
        "gda": lambda: tiny.gda_config(4, 4, 2, **SIZES),
        "gda eps": lambda: tiny.gda_config(4, 4, 2, **SIZES, attn_rms_norm_eps=1e-3),
        "diffllama": lambda: tiny.diffllama_config(8, 4, **SIZES),
        "motif": lambda: tiny.motif_config(4, 4, 2, **SIZES),
        "motif silu": lambda: tiny.motif_config(4, 4, 2, **SIZES, hidden_act="silu"),
    }[name]()
    return tiny.make_folder(path, made, dtype)


WAYS = [
    ("gda", "diff_v1", "exact"),
    ("gda", "diffllama", "rounded"),
    ("gda eps", "diffllama", "rounded"),
    ("diff_v1", "gda", "exact"),
    ("diff_v1", "diffllama", "rounded"),
    ("diff_v1 extras", "gda", "exact"),  # biases and head norms
    ("diff_v1-plain", "gda", "exact"),  # no norm over a head
    ("diffllama", "gda", "exact"),
    ("diffllama", "diff_v1", "exact"),
    ("motif", "gda", "exact"),
    ("motif", "diff_v1", "exact"),
    ("motif silu", "diffllama", "rounded"),
]


@pytest.mark.parametrize(("source", "to", "label"), WAYS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_formats_hold_the_same_model(
    tmp_path: Path, source: str, to: str, label: str, dtype: str
) -> None:
    folder = write_source(tmp_path / "a", source, dtype)
    plan = convert(folder, tmp_path / "b", to)
    assert plan.exactness.value == label and plan.family.name == to
    before = logits_of(folder)[0]
    limit = allowed(before, dtype, rounded=label == "rounded")
    assert difference(before, logits(tmp_path / "b")) <= limit


@pytest.mark.parametrize("forgotten", ["gain", "scale", "lambda", "epsilon"])
def test_each_correction_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    folder = write_source(tmp_path / "a", "gda eps")
    if forgotten == "scale":
        monkeypatch.setattr("growkit.surgery.lambdas.LambdaChange.scale_factor", 1.0)
    elif forgotten == "epsilon":
        monkeypatch.setattr(differential, "sqrt", lambda value: 1.0)
    elif forgotten == "lambda":
        monkeypatch.setattr(
            "growkit.surgery.execute.change_lambda",
            lambda *v: tuple(np.asarray(x, np.float32) for x in v[:4]),
        )
    convert(folder, tmp_path / "b", "diffllama")
    written = tmp_path / "b"
    if forgotten == "gain":
        tensors, source = tiny.read_folder(written), tiny.read_folder(folder)
        for layer in range(LAYERS):
            at = f"model.layers.{layer}.self_attn."
            tensors[at + "o_proj.weight"] /= np.tile(source[at + "subln.weight"], 4)
        written = tiny.write_folder(tmp_path / "c", tiny.read_config(written), tensors)
    before = logits(folder)
    assert difference(before, logits(written)) > 10 * allowed(before)


def test_there_and_back_gives_the_same_bits(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "a", "gda", "BF16")
    convert(folder, tmp_path / "b", "diff_v1")
    convert(tmp_path / "b", tmp_path / "c", "gda")
    one, other = tiny.read_folder(folder), tiny.read_folder(tmp_path / "c")
    assert one.keys() == other.keys()
    assert all(tiny.same_bits(one[name], other[name]) for name in one)


REFUSED = {
    "ratio": (tiny.gda_config(4, 2, 2, **SIZES), "diffllama", "growkit grow --noise-heads 4"),
    "shared keys": (tiny.gda_config(4, 4, 2, own=False, **SIZES), "diff_v1", "share their keys"),
    "no norm": (tiny.gda_config(4, 4, 2, **SIZES, sub_layer_norm=False), "diffllama", "normalise"),
    "poly norm": (tiny.motif_config(4, 4, 2, **SIZES), "diffllama", "poly_norm"),
    "itself": (tiny.gda_config(4, 4, 2, **SIZES), "gda", "already"),
    "ordinary": (tiny.llama_config(4, 2, **SIZES), "diffllama", "not differential attention"),
    "gda ratio": (tiny.motif_config(4, 4, 2, **SIZES), "gda --ratio 2", "--noise-heads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, to, words = REFUSED[name]
    folder = tiny.make_folder(tmp_path / "a", config)
    arguments = ["--to", *to.split(), "--out", str(tmp_path / "b")]
    assert main(["convert", str(folder), *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
