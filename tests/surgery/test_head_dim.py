"""More channels a head: the function, the bytes of random models, refusals, what breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from family_checkpoints import (
    T5_KINDS,
    family_config,
    layer_norm_config,
    write_checkpoint,
    write_t5,
)
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


def verified(a: Path, b: Path) -> VerificationReport:
    return verify_checkpoints(a, b, tokens=64, window=32, generate_tokens=4)


@pytest.mark.parametrize("request_", [{"head_dim": "x2"}, {"head_dim": "12", "query_heads": "x2"}])
@pytest.mark.parametrize("factor", [1.0, 0.5, 0.25])
def test_phi3_keeps_its_rotated_channels(
    tmp_path: Path, factor: float, request_: dict[str, Any]
) -> None:
    """Its class rotates a part of a head, so even full rotary encoding leaves room for more."""
    source = write_checkpoint(tmp_path / "a", family_config("phi3", partial_rotary_factor=factor))
    plan = tiny.grow(source, tmp_path / "b", **request_, ffn="+3", layers="+1")
    assert plan.exactness.value == "rounded"
    report = verified(source, tmp_path / "b")
    assert report.passed and report.max_difference < 5e-6, report.cause
    assert f"{int(8 * factor)} of them rotated as before" in str(plan.growth.steps)
    # Negative control: the old factor turns more channels, with other frequencies.
    config = tiny.read_config(tmp_path / "b")
    config["rope_parameters"]["partial_rotary_factor"] = factor
    (tmp_path / "b" / "config.json").write_text(
        json.dumps(config | {"partial_rotary_factor": factor})
    )
    assert not verified(source, tmp_path / "b").passed


def test_four_times_the_channels_round_nothing(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", family_config("phi3"), torch.bfloat16)
    plan = tiny.grow(source, tmp_path / "b", head_dim="x4")
    assert plan.exactness.value == "exact" and plan.growth.key_factor == 2.0
    assert verified(source, tmp_path / "b").max_difference < 5e-6


@pytest.mark.parametrize("kind", T5_KINDS)
def test_t5_has_no_softmax_scale(tmp_path: Path, kind: str) -> None:
    source = write_t5(tmp_path / "a", kind)
    plan = tiny.grow(source, tmp_path / "b", head_dim="+5", heads="x2", decoder_layers="+1")
    assert plan.exactness.value == "exact" and plan.growth.key_factor == 1.0
    assert verified(source, tmp_path / "b").passed
    assert tiny.read_config(tmp_path / "b")["d_kv"] == 17


@pytest.mark.parametrize(
    ("family", "cause"),
    [
        ("llama", "frequencies and its pairs"),
        ("smollm3", "frequencies and its pairs"),
        ("gemma2", "frequencies and its pairs"),
        ("qwen3", "norms of query and key heads"),
        ("gemma3", "norms of query and key heads"),
        ("olmo2", "norms of query and key heads"),
    ],
)
def test_refusals_say_why(tmp_path: Path, family: str, cause: str) -> None:
    source = write_checkpoint(tmp_path / "a", family_config(family))
    with open_checkpoint(source) as checkpoint, pytest.raises(UsageError) as refusal:
        build_plan(checkpoint, GrowthRequest(head_dim="x2").operators())
    assert cause in refusal.value.cause and "--heads" in refusal.value.remedy


def test_long_context_factors_of_phi3_are_refused_in_the_plan(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    config = family_config("phi3", rope_parameters=rope, partial_rotary_factor=1.0)
    source = write_checkpoint(tmp_path / "a", config)
    with (
        open_checkpoint(source) as checkpoint,
        pytest.raises(UsageError, match="Phi3Config wants 2 numbers"),
    ):
        build_plan(checkpoint, GrowthRequest(head_dim="x2").operators())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])
def test_grow_then_shrink(tmp_path: Path, family: str) -> None:
    """Keys carry a factor of two here, which takes nothing off their bits."""
    source = write_checkpoint(tmp_path / "a", layer_norm_config(family), torch.bfloat16)
    plan = tiny.grow(source, tmp_path / "b", head_dim="x4", hidden="x4", ffn="+3", layers="+1")
    old, back = tiny.read_folder(source), shrink(plan, tiny.read_folder(tmp_path / "b"))
    assert old.keys() == back.keys()
    assert all(tiny.same_bits(old[name], back[name]) for name in old)


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 4),
    dim=st.integers(1, 6),
    more=st.integers(1, 7),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_naive_growth_of_fused_heads_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, heads: int, dim: int, more: int, dtype: torch.dtype
) -> None:
    """q, k, v of GPT-2 stand in columns: by hand, with numpy alone."""
    path = tmp_path_factory.mktemp("head_dim")
    hidden, wide = heads * dim, dim + more
    config = layer_norm_config("gpt2", n_embd=hidden, n_head=heads, n_layer=1, n_inner=3)
    source = write_checkpoint(path / "a", config, dtype)
    tiny.grow(source, path / "b", head_dim=str(wide), hidden=str(heads * wide), hidden_method="pad")
    old, new = tiny.read_folder(source), tiny.read_folder(path / "b")
    at = "transformer.h.0.attn."
    before = old[at + "c_attn.weight"].reshape(hidden, 3, heads, dim)
    after = new[at + "c_attn.weight"].reshape(heads * wide, 3, heads, wide)
    factor = np.float32((wide / dim) ** 0.5)
    keys = (before[:, 1].astype(np.float32) * factor).astype(before.dtype)
    for part, kept in ((0, before[:, 0]), (1, keys), (2, before[:, 2])):
        assert (after[:hidden, part, :, :dim] == kept).all()
    assert not after[:, 1, :, dim:].any()
    assert after[:, 0].all() and after[:, 2].all()
    bias = new[at + "c_attn.bias"].reshape(3, heads, wide)
    kept_bias = old[at + "c_attn.bias"].reshape(3, heads, dim)
    assert (bias[0, :, :dim] == kept_bias[0]).all() and not bias[:, :, dim:].any()
    assert (bias[1, :, :dim] == (kept_bias[1].astype(np.float32) * factor).astype(bias.dtype)).all()
    output = new[at + "c_proj.weight"].reshape(heads, wide, heads * wide)
    kept_output = old[at + "c_proj.weight"].reshape(heads, dim, hidden)
    assert (output[:, :dim, :hidden] == kept_output).all() and not output[:, dim:].any()
    means = kept_output.astype(np.float64).mean(axis=-1, keepdims=True).astype(output.dtype)
    assert (output[:, :dim, hidden:] == means).all()
    rows = old["transformer.h.0.mlp.c_proj.weight"].astype(np.float64).mean(axis=1, keepdims=True)
    written = new["transformer.h.0.mlp.c_proj.weight"][:, hidden:]
    assert (written == rows.astype(written.dtype)).all()


def test_means_of_rows_do_not_depend_on_blocks(tmp_path: Path) -> None:
    """A writer whose rows are read in several blocks: each new row is the mean of all old ones."""
    config = layer_norm_config("gpt_neox", intermediate_size=3000)
    source = write_checkpoint(tmp_path / "a", config)
    tiny.grow(source, tmp_path / "b", hidden="40", heads="+1", threads=3)
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    old, new = tiny.read_folder(source)[name], tiny.read_folder(tmp_path / "b")[name]
    assert (new[:32] == old).all()
    assert (new[32:] == old.astype(np.float64).mean(axis=0).astype(np.float32)).all()


def test_diff_sees_a_key_channel_that_speaks(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", family_config("phi3"))
    tiny.grow(source, tmp_path / "b", head_dim="12")
    file = tmp_path / "b" / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}

    def report() -> dict[str, Any]:
        with open_checkpoint(source) as a, open_checkpoint(tmp_path / "b") as b:
            return diff_checkpoints(a, b)

    assert report()["as_grown"]
    rows = tensors["model.layers.2.self_attn.qkv_proj.weight"]
    assert rows.shape[0] == 12 * (4 + 2 + 2)
    rows[12 * 4 + 11, 0] = 1e-4  # the last channel of the first key head
    save_file(tensors, file, {"format": "pt"})
    found = report()
    assert not found["as_grown"]
    assert sum(group["differing"] for group in found["groups"]) == 1
    rows[12 * 4 + 11, 0] = 0
    rows[11, 0] = 7.0  # a random channel of a query may hold anything
    save_file(tensors, file, {"format": "pt"})
    assert report()["as_grown"]


def test_new_channels_learn_within_two_steps(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", family_config("phi3"))
    plan = tiny.grow(source, tmp_path / "b", head_dim="12")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    reached = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(2):
        ids = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            reached[name] += parameter.grad.abs()
        optimizer.step()
    for tensor in plan.tensors:
        for axis, dim in enumerate(tensor.dims):
            for start, end in dim.new_ranges if dim is not None else []:
                part = reached[tensor.output.name].narrow(axis, start, end - start)
                assert (part != 0).float().mean() > 0.95, tensor.output.name
