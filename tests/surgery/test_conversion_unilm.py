"""Microsoft's own files of DIFF V1: read as they are, moved to our pairs of channels, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
import unilm_reference
from converted import allowed, convert, difference, logits
from growth_matrix import logits_of
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from growkit.checkpoint import open_checkpoint
from growkit.cli.main import main
from growkit.diff.folders import diff_checkpoints
from growkit.variants.diffllama import convert as differential
from growkit.variants.unilm_diff_v1 import convert as unilm
from growkit.variants.unilm_diff_v1.attention import rotate_interleaved
from growkit.verification.loading import register_own_models

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 24, "head_dim": 8}
IDS = torch.randint(256, (24,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _own_models() -> None:
    register_own_models()


def computed(folder: Path) -> torch.Tensor:
    """Logits [n, vocab] of ``IDS`` by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS[None]).logits[0]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("to", ["diff_v1", "gda", "diffllama"])
def test_the_reference_and_what_it_becomes_compute_the_same(
    tmp_path: Path, to: str, dtype: str
) -> None:
    folder = unilm_reference.write_folder(tmp_path / "a", dtype)
    expected = unilm_reference.model_logits(folder, IDS)
    limit = allowed(expected, dtype)
    assert difference(expected, computed(folder)) <= limit
    plan = convert(folder, tmp_path / "b", to)
    rounded = to == "diffllama"
    assert plan.exactness.value == ("rounded" if rounded else "exact")
    found = difference(expected, computed(tmp_path / "b"))
    assert found <= allowed(expected, dtype, rounded=rounded)


@pytest.mark.parametrize("to", ["diff_v1", "gda"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_there_and_back_gives_the_same_bits(tmp_path: Path, to: str, dtype: str) -> None:
    folder = unilm_reference.write_folder(tmp_path / "a", dtype)
    convert(folder, tmp_path / "b", to)
    plan = convert(tmp_path / "b", tmp_path / "c", "unilm_diff_v1")
    assert plan.exactness.value == "exact"
    one, other = tiny.read_folder(folder), tiny.read_folder(tmp_path / "c")
    assert one.keys() == other.keys()
    assert all(tiny.same_bits(one[name], other[name]) for name in one)


SOURCES: dict[str, tuple[tiny.Config, str]] = {
    "diffllama": (tiny.diffllama_config(8, 4, **SIZES, rope_theta=100.0), "rounded"),
    "motif": (tiny.motif_config(4, 4, 2, **SIZES, hidden_act="silu"), "rounded"),
    "gda": (tiny.gda_config(4, 4, 2, **SIZES, attn_rms_norm_eps=1e-3), "rounded"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_other_formats_become_files_that_the_reference_computes(tmp_path: Path, name: str) -> None:
    """lambda_init by the layer index, epsilon 1e-5 and a gain, whatever the source has."""
    config, label = SOURCES[name]
    folder = tiny.make_folder(tmp_path / "a", config)
    plan = convert(folder, tmp_path / "b", "unilm_diff_v1")
    assert plan.exactness.value == label
    before = logits_of(folder)[0]
    assert difference(before, logits(tmp_path / "b")) <= allowed(before, rounded=True)
    expected = unilm_reference.model_logits(tmp_path / "b", IDS)
    assert difference(expected, computed(tmp_path / "b")) <= allowed(expected)


def left_alone(shape: Any, to: str) -> dict[str, Any]:
    return {}


def the_other_way(shape: Any, to: str) -> dict[str, Any]:
    order = unilm.pairs_from_halves(8)
    return dict.fromkeys(("q", "k"), ({}, {"head_dim": unilm.AxisMap(order, 8)}))


def queries_only(shape: Any, to: str) -> dict[str, Any]:
    return {"q": reordered(shape, to)["q"]}


reordered = unilm.reordered_channels


@pytest.mark.parametrize("wrong", [left_alone, the_other_way, queries_only])
def test_a_wrong_order_of_channels_is_seen(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: Any,
) -> None:
    folder = unilm_reference.write_folder(tmp_path / "a")
    arguments = ["convert", str(folder), "--to", "diff_v1", "--out", str(tmp_path / "b")]
    monkeypatch.setattr(differential, "reordered_channels", wrong)
    assert main(arguments) == 3
    assert "first differs after layer 0" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    monkeypatch.undo()
    assert main(arguments) == 0
    with open_checkpoint(folder) as one, open_checkpoint(tmp_path / "b") as other:
        assert diff_checkpoints(one, other)["as_grown"] is True


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_channels_in_another_order_are_rotated_alike(half: int, seed: int) -> None:
    dim = 2 * half
    ours, theirs = unilm.halves_from_pairs(dim), unilm.pairs_from_halves(dim)
    assert (ours[theirs] == np.arange(dim)).all() and (theirs[ours] == np.arange(dim)).all()
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, 2, 5, dim, generator=generator)
    angle = torch.rand(1, 5, half, generator=generator).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    rotated = rotate_interleaved(states, cos[:, None], sin[:, None])
    expected, _ = apply_rotary_pos_emb(states[..., ours], states, cos, sin)
    torch.testing.assert_close(rotated[..., ours], expected)


def test_it_grows_as_it_is_where_the_module_can_hold_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An inserted layer moves lambda_init, which follows the layer index there."""
    folder = unilm_reference.write_folder(tmp_path / "a")
    sizes = ["--layers", "+1", "--ffn", "x1.5", "--kv-heads", "x2", "--out", str(tmp_path / "b")]
    assert main(["grow", str(folder), *sizes]) == 0
    assert "verification passed" in capsys.readouterr().out
    expected = unilm_reference.model_logits(folder, IDS)
    found = unilm_reference.model_logits(tmp_path / "b", IDS)
    assert difference(expected, found) <= allowed(expected)
    for option in ("--signal-heads", "--hidden"):
        assert main(["grow", str(folder), option, "x2", "--out", str(tmp_path / "c")]) == 2
        assert "convert to diff_v1 first" in " ".join(capsys.readouterr().err.split())


BIASED: dict[str, Any] = {"attention_bias": True, "attention_output_bias": True}
REFUSED: dict[str, tuple[tiny.Config, str]] = {
    "ratio": (tiny.gda_config(4, 2, 2, **SIZES), "growkit grow --noise-heads 4"),
    "no norm": (tiny.gda_config(4, 4, 2, **SIZES, sub_layer_norm=False), "normalise"),
    "width": (tiny.gda_config(4, 4, 2, **SIZES | {"hidden_size": 32}), "derives head_dim"),
    "biases": (tiny.gda_config(4, 4, 2, **SIZES, **BIASED), "biases"),
    "ordinary": (tiny.llama_config(4, 2, **SIZES), "not differential attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_module_cannot_hold_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, words = REFUSED[name]
    folder = tiny.make_folder(tmp_path / "a", config)
    assert (
        main(["convert", str(folder), "--to", "unilm_diff_v1", "--out", str(tmp_path / "b")]) == 2
    )
    assert words in " ".join(capsys.readouterr().err.split())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, "lambda_q1"),  # heads, not maps
        ({"attn_rms_norm_eps": 1e-6}, "attn_rms_norm_eps"),
        ({"lambda_init": [0.2, 0.3]}, "lambda_init"),
        ({"head_dim": 4}, "hidden size"),
    ],
)
def test_a_config_that_is_not_the_modules_is_refused(
    tmp_path: Path, changes: tiny.Config, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unilm_reference.write_folder(tmp_path / "a", **changes)
    assert main(["inspect", str(folder)]) != 0
    assert words in " ".join(capsys.readouterr().err.split())
