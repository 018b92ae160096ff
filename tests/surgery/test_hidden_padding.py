"""Hidden sizes that are no whole multiple: the function, the bytes, gradients, and what breaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from family_checkpoints import BIASES, EXPERTS, FAMILIES, family_config, fitting, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shrink import shrink
from transformers import AutoModelForCausalLM

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError
from growkit.diff.folders import diff_checkpoints
from growkit.surgery.plan import build_plan
from growkit.surgery.request import GrowthRequest
from growkit.verification import VerificationReport, verify_checkpoints

Tensors = dict[str, torch.Tensor]
SHARED = ("qwen3", "qwen3_moe", "gemma3", "olmo2", "olmo3")
DIFFERENTIAL: dict[str, tiny.Config] = {
    "gda": tiny.gda_config(4, 2, 1, hidden_size=32),
    "gda-tied": tiny.gda_config(4, 2, 2, hidden_size=32, tie_word_embeddings=True),
    "motif": tiny.motif_config(4, 4, 2, hidden_size=32),
    "diffllama": tiny.diffllama_config(8, 4, hidden_size=32),
}


def verified(a: Path, b: Path) -> VerificationReport:
    return verify_checkpoints(a, b, tokens=64, window=32, generate_tokens=4)


def change_config(folder: Path, **changes: Any) -> None:
    config = tiny.read_config(folder) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# -- the function ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_algebra_is_exact(tmp_path: Path, family: str, tied: bool) -> None:
    """In float64, where only gains, scaled embeddings and inputs of shared norms are rounded."""
    config = family_config(family, bias=tied and family in BIASES, tie_word_embeddings=tied)
    # The product of experts has no float64.
    dtype = torch.float32 if family in EXPERTS else torch.float64
    source = write_checkpoint(tmp_path / "a", config, dtype)
    plan = tiny.grow(source, tmp_path / "b", hidden="40")
    report = verified(source, tmp_path / "b")
    # Several classes compute norms in float32 whatever their weights are.
    assert report.passed or report.max_difference < 2e-5, report.cause
    assert report.max_difference < 2e-5
    expected = "rounded" if family in SHARED or family.startswith("gemma") else "exact"
    assert plan.exactness.value == expected
    field = plan.family.norm.eps_field
    assert field == "rms_norm_eps"
    before = tiny.read_config(source)[field]
    assert tiny.read_config(tmp_path / "b")[field] == pytest.approx(before * 32 / 40, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_keeps_every_old_weight(tmp_path: Path, family: str) -> None:
    """Gains are written in float32, so nothing rounds but Gemma's scaled embedding."""
    source = write_checkpoint(tmp_path / "a", family_config(family), torch.bfloat16)
    request = fitting(family, {"hidden": "48", "layers": "+1", "ffn": "+8", "heads": "x2"})
    plan = tiny.grow(source, tmp_path / "b", **request)
    report = verified(source, tmp_path / "b")
    assert report.passed, report.cause
    if family not in SHARED and not family.startswith("gemma"):
        assert plan.exactness.value == "exact" and report.max_difference < 2e-5
    grown = tiny.read_folder(tmp_path / "b")
    assert grown["model.norm.weight"].dtype == np.float32


@pytest.mark.parametrize("name", DIFFERENTIAL)
def test_differential_families(tmp_path: Path, name: str) -> None:
    source = tiny.make_folder(tmp_path / "a", DIFFERENTIAL[name])
    tiny.grow(source, tmp_path / "b", hidden="41", uniform_heads="x2", layers="+1")
    report = verified(source, tmp_path / "b")
    assert report.passed and report.max_difference < 1e-4, report.cause


@pytest.mark.parametrize("mode", ["split", "even", "noise"])
def test_symmetry_of_other_axes_is_kept(tmp_path: Path, mode: str) -> None:
    source = write_checkpoint(tmp_path / "a", family_config("llama"))
    tiny.grow(source, tmp_path / "b", hidden="48", heads="x2", ffn="x2", symmetry=mode)
    assert verified(source, tmp_path / "b").passed


def test_whole_multiples_tile_unless_padding_is_asked_for(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", family_config("llama"))
    tiled = tiny.grow(source, tmp_path / "b", hidden="x2")
    padded = tiny.grow(source, tmp_path / "c", hidden="x2", hidden_method="pad")
    assert "padded" not in tiled.growth.steps[0].summary
    assert "padded" in padded.growth.steps[0].summary
    assert verified(source, tmp_path / "c").passed
    with (
        open_checkpoint(source) as checkpoint,
        pytest.raises(UsageError, match=r"multiple of 32"),
    ):
        build_plan(checkpoint, GrowthRequest(hidden="40", hidden_method="tile").operators())


# -- norms that share epsilon ---------------------------------------------------------------------


def test_a_shared_epsilon_is_made_up_for_in_float32_alone(tmp_path: Path) -> None:
    """OLMo 2 on a small stream: queries have a mean square near its epsilon."""
    config = family_config("olmo2", rms_norm_eps=1e-5)
    source = write_checkpoint(tmp_path / "a", config)
    plan = tiny.grow(source, tmp_path / "b", hidden="48")
    exact = verified(source, tmp_path / "b")
    assert exact.passed and exact.max_difference < 1e-5
    assert any("share the rescaled rms_norm_eps" in warning for warning in plan.warnings)
    old, new = tiny.read_folder(source), tiny.read_folder(tmp_path / "b")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert new[name][:, :32] == pytest.approx(old[name] * (32 / 48) ** 0.5, rel=1e-6)

    def unscaled(tensors: Tensors) -> None:
        for name in tensors:
            if "q_proj" in name or "k_proj" in name:
                tensors[name] /= (32 / 48) ** 0.5

    change_tensors(tmp_path / "b", unscaled)
    broken = verified(source, tmp_path / "b")
    assert not broken.passed and broken.max_difference > 100 * exact.max_difference
    # In bfloat16 that is what is written: its effect stays below the rounding of the dtype.
    half = write_checkpoint(tmp_path / "c", config, torch.bfloat16)
    plan = tiny.grow(half, tmp_path / "d", hidden="48")
    assert plan.exactness.value == "rounded"
    report = verified(half, tmp_path / "d")
    assert report.passed and 1e-4 < report.max_difference < 1e-2
    written = np.ascontiguousarray(tiny.read_folder(tmp_path / "d")[name][:, :32])
    assert tiny.same_bits(tiny.read_folder(half)[name], written)


# -- negative controls ----------------------------------------------------------------------------


def small(tensors: Tensors) -> None:
    """A residual stream of 1e-2, where epsilon counts."""
    for name in tensors:
        if any(word in name for word in ("embed_tokens", "o_proj", "down_proj")):
            tensors[name] *= 0.05


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_epsilon_that_is_not_rescaled_fails(tmp_path: Path, family: str) -> None:
    source = write_checkpoint(tmp_path / "a", family_config(family, rms_norm_eps=1e-5))
    change_tensors(source, small)
    tiny.grow(source, tmp_path / "b", hidden="48")
    assert verified(source, tmp_path / "b").passed
    change_config(tmp_path / "b", rms_norm_eps=1e-5)
    report = verified(source, tmp_path / "b")
    assert not report.passed and report.max_difference > 100 * report.tolerance


def gain_not_rescaled(tensors: Tensors) -> None:
    tensors["model.layers.1.input_layernorm.weight"] *= (40 / 32) ** 0.5


def gain_without_offset(tensors: Tensors) -> None:
    name = "model.layers.1.input_layernorm.weight"
    gain = (tensors[name] + 1) * (40 / 32) ** 0.5
    tensors[name] = (gain - 1) * (32 / 40) ** 0.5


def embedding_not_divided(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"] *= (40 / 32) ** 0.5


def padded_with_the_mean(tensors: Tensors) -> None:
    """What a LayerNorm needs, and an RMSNorm does not bear."""
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 32:] = embedding[:, :32].mean(1, keepdim=True)


def speaking_channel(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.down_proj.weight"][36] = 0.1


BROKEN: dict[str, tuple[str, bool, Callable[[Tensors], None]]] = {
    "gain": ("llama", False, gain_not_rescaled),
    "gemma gain": ("gemma2", False, gain_without_offset),
    "gemma embedding": ("gemma3", True, embedding_not_divided),
    "mean": ("llama", False, padded_with_the_mean),
    "new channel": ("phi3", False, speaking_channel),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_padding_fails(tmp_path: Path, name: str) -> None:
    family, tied, change = BROKEN[name]
    source = write_checkpoint(tmp_path / "a", family_config(family, tie_word_embeddings=tied))
    tiny.grow(source, tmp_path / "b", hidden="40")
    change_tensors(tmp_path / "b", change)
    report = verified(source, tmp_path / "b")
    assert not report.passed and report.max_difference > 100 * report.tolerance


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gemma3", "phi3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_new_parameter_learns(tmp_path: Path, family: str, tied: bool) -> None:
    """Within two steps; the last post-norm of a tied model within three, since the embedding that
    reads its new channels is zero at first, and so are the channels in front of it."""
    source = write_checkpoint(tmp_path / "a", family_config(family, tie_word_embeddings=tied))
    plan = tiny.grow(source, tmp_path / "b", hidden="40")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    reached = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(3 if tied and plan.family.tensor("ffn_post_norm") else 2):
        ids = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            reached[name] += parameter.grad.abs()
        optimizer.step()
    for tensor in plan.tensors:
        seen = reached[tensor.output.name]
        for axis, dim in enumerate(tensor.dims):
            for start, end in dim.new_ranges if dim is not None else []:
                part = seen.narrow(axis, start, end - start)
                if tensor.role == "embed":  # tokens that do not occur
                    part = part[(part != 0).any(1)]
                    assert len(part)
                assert (part != 0).float().mean() > 0.99, tensor.output.name


# -- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2", "gemma2"])
def test_grow_then_shrink(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    source = write_checkpoint(tmp_path / "a", family_config(family, bias=family in BIASES), dtype)
    plan = tiny.grow(source, tmp_path / "b", hidden="40", ffn="+9", layers="+2")
    old, back = tiny.read_folder(source), shrink(plan, tiny.read_folder(tmp_path / "b"))
    assert old.keys() == back.keys()
    rescaled = {tensor.source for tensor in plan.tensors if tensor.factor != 1.0}
    for name in old:
        if name not in rescaled:
            assert tiny.same_bits(old[name], back[name]), name
            continue
        gain = "norm" in name
        assert gain or family in ("gemma2", "olmo2"), name
        wide = [array[name].astype(np.float64) for array in (old, back)]
        rounding = 1e-6 if gain or dtype == torch.float32 else 2**-7
        assert np.allclose(*wide, rtol=rounding, atol=1e-7), name


@settings(max_examples=25, deadline=None)
@given(
    hidden=st.integers(1, 9),
    added=st.integers(1, 20),
    tied=st.booleans(),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
    shards=st.integers(1, 3),
)
def test_naive_padding_is_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    hidden: int,
    added: int,
    tied: bool,
    dtype: str,
    shards: int,
) -> None:
    path = tmp_path_factory.mktemp("padding")
    biases = {"attention_bias": True, "mlp_bias": True}
    config = tiny.llama_config(
        2, 1, hidden_size=4 * hidden, head_dim=4, tie_word_embeddings=tied, **biases
    )
    old = tiny.make_tensors(config, dtype)
    tiny.write_folder(path / "a", config, old, shards=shards)
    width = 4 * hidden + added
    width += -width % 2  # LlamaConfig wants a multiple of the heads
    tiny.grow(path / "a", path / "b", hidden=str(width), hidden_method="pad")
    new = tiny.read_folder(path / "b")
    assert new.keys() == old.keys()
    more = width - 4 * hidden
    for name, array in old.items():
        if "norm" in name:
            factor = (4 * hidden / width) ** 0.5
            padded = np.concatenate([array.astype(np.float32), np.ones(more, np.float32)])
            assert (new[name] == padded * np.float32(factor)).all(), name
            exact = np.log2(factor) % 1 == 0
            assert new[name].dtype == (array.dtype if exact else np.float32), name
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            assert tiny.same_bits(new[name], np.pad(array, ((0, more), (0, 0)))), name
        elif name.endswith(("o_proj.bias", "down_proj.bias")):
            assert tiny.same_bits(new[name], np.pad(array, (0, more))), name
        elif "embed" in name:
            assert tiny.same_bits(new[name], np.pad(array, ((0, 0), (0, more)))), name
        elif name.endswith("bias"):
            assert tiny.same_bits(new[name], array), name
        else:
            assert tiny.same_bits(np.ascontiguousarray(new[name][:, : 4 * hidden]), array), name
            fresh = new[name][:, 4 * hidden :].astype(np.float64)
            assert fresh.all() and len(np.unique(fresh)) > 0.5 * min(fresh.size, 100)
            assert 0.3 < fresh.std() / tiny.STD < 3 or fresh.size < 40


def test_threads_and_shards_change_nothing(tmp_path: Path) -> None:
    config = tiny.llama_config(4, 2, hidden_size=32, intermediate_size=4000)
    for name, shards in (("a1", 1), ("a3", 3)):
        tiny.write_folder(tmp_path / name, config, tiny.make_tensors(config, "BF16"), shards=shards)
    tiny.grow(tmp_path / "a1", tmp_path / "b1", hidden="52", ffn="+9", new_units="zero")
    tiny.grow(
        tmp_path / "a3",
        tmp_path / "b3",
        hidden="52",
        ffn="+9",
        new_units="zero",
        threads=3,
        max_shard_size="200KB",
    )
    first, second = tiny.read_folder(tmp_path / "b1"), tiny.read_folder(tmp_path / "b3")
    assert all(tiny.same_bits(first[name], second[name]) for name in first | second)


# -- growkit diff ---------------------------------------------------------------------------------


def explained(a: Path, b: Path) -> dict[str, Any]:
    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        return diff_checkpoints(first, second)


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma3"])
def test_diff_explains_and_sees_one_entry(tmp_path: Path, family: str) -> None:
    source = write_checkpoint(tmp_path / "a", family_config(family))
    tiny.grow(source, tmp_path / "b", hidden="48", heads="x2")
    report = explained(source, tmp_path / "b")
    assert report["as_grown"]
    texts = {group["tensor"]: group["text"] for group in report["groups"]}
    assert "32-47 new (zero)" in texts["model.embed_tokens.weight"]
    assert "columns 0-31" in texts["model.layers.{layer}.self_attn.q_proj.weight"]
    assert "32-47 new" in texts["model.layers.{layer}.self_attn.q_proj.weight"]
    for name, row, column in (
        ("model.embed_tokens.weight", 3, 40),
        ("model.layers.1.self_attn.o_proj.weight", 40, 3),
        ("model.layers.1.self_attn.q_proj.weight", 3, 3),
    ):

        def flip(tensors: Tensors, place: tuple[str, int, int] = (name, row, column)) -> None:
            tensors[place[0]][place[1], place[2]] += 0.5

        change_tensors(tmp_path / "b", flip)
        changed = [g for g in explained(source, tmp_path / "b")["groups"] if g["differing"]]
        assert sum(group["differing"] for group in changed) == 1

        def back(tensors: Tensors, place: tuple[str, int, int] = (name, row, column)) -> None:
            tensors[place[0]][place[1], place[2]] -= 0.5

        change_tensors(tmp_path / "b", back)
