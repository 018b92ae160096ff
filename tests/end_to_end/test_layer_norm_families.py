"""GPT-2, GPT-NeoX and OPT: written by transformers, grown, loaded by transformers, compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from family_checkpoints import LAYER_NORM_FAMILIES, layer_norm_config, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from growkit.checkpoint import open_checkpoint
from growkit.cli.main import main
from growkit.core.errors import UsageError
from growkit.diff.folders import diff_checkpoints
from growkit.families import family_of
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.plan import build_plan
from growkit.surgery.request import GrowthRequest
from growkit.verification import VerificationReport, verify_checkpoints

Tensors = dict[str, torch.Tensor]
EVERYTHING = {"heads": "+2", "head_dim": "12", "hidden": "72", "ffn": "x1.5", "layers": "+2"}
REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"layers": "+2"}, "bit-exact"),
    "ffn": ({"ffn": "+5"}, "exact"),
    "new units": ({"ffn": "+5", "new_units": "zero"}, "bit-exact"),
    "tiled": ({"hidden": "x2", "heads": "x2"}, "exact"),
    "tiled, new heads": ({"hidden": "x2", "heads": "x2", "new_heads": "zero"}, "exact"),
    "padded, heads": ({"hidden": "48", "heads": "+2"}, "rounded"),
    "padded, new heads": ({"hidden": "40", "heads": "+1", "new_heads": "zero"}, "rounded"),
    "padded, channels": ({"hidden": "44", "head_dim": "11"}, "rounded"),
    "channels": ({"hidden": "x4", "head_dim": "x4"}, "exact"),
    "everything": (EVERYTHING, "rounded"),
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


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("family", LAYER_NORM_FAMILIES)
def test_growth_keeps_the_function(tmp_path: Path, family: str, name: str) -> None:
    request, label = REQUESTS[name]
    config = layer_norm_config(family, tie_word_embeddings=len(name) % 2 == 0)
    source = write_checkpoint(tmp_path / "a", config)
    plan = tiny.grow(source, tmp_path / "b", **request)
    report = verified(source, tmp_path / "b")
    assert report.passed and report.max_difference < 5e-6, report.cause
    assert plan.exactness.value == label
    if label == "bit-exact":
        assert report.max_difference == 0.0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", LAYER_NORM_FAMILIES)
def test_the_algebra_is_exact(tmp_path: Path, family: str, tied: bool) -> None:
    """In float64: means, rescaled gains, epsilons, keys and streams leave 1e-12 of the logits."""
    source = write_checkpoint(
        tmp_path / "a", layer_norm_config(family, tie_word_embeddings=tied), torch.float64
    )
    tiny.grow(source, tmp_path / "b", **EVERYTHING)
    report = verified(source, tmp_path / "b")
    # NeoX turns its heads in float32.
    assert report.max_difference < (1e-6 if family == "gpt_neox" else 1e-12)


@pytest.mark.parametrize("name", ["tiled", "padded, heads", "everything"])
@pytest.mark.parametrize("family", LAYER_NORM_FAMILIES)
def test_bfloat16(tmp_path: Path, family: str, name: str) -> None:
    request, _ = REQUESTS[name]
    config = layer_norm_config(family, tie_word_embeddings=True)
    source = write_checkpoint(tmp_path / "a", config, torch.bfloat16)
    tiny.grow(source, tmp_path / "b", **request)
    report = verified(source, tmp_path / "b")
    assert report.passed, report.cause
    # A mean that is rounded moves the mean of the stream alone; OPT's whole stream is rescaled.
    limit = 2e-5 if name == "tiled" else 2e-2 if family == "opt" else 3e-3
    assert report.max_difference < limit


@pytest.mark.parametrize("mode", ["split", "even", "noise"])
@pytest.mark.parametrize("family", LAYER_NORM_FAMILIES)
def test_symmetry_of_every_copied_axis(tmp_path: Path, family: str, mode: str) -> None:
    source = write_checkpoint(tmp_path / "a", layer_norm_config(family, tie_word_embeddings=True))
    plan = tiny.grow(source, tmp_path / "b", hidden="x2", heads="x2", ffn="x2", symmetry=mode)
    assert verified(source, tmp_path / "b").passed
    grown = tiny.read_folder(tmp_path / "b")
    for tensor in plan.tensors:
        for axis, dim in enumerate(tensor.dims):
            if dim is None or not dim.shares or dim.block != 1:
                continue
            parts = [
                np.take(grown[tensor.output.name], np.flatnonzero(dim.rank == rank), axis)
                for rank in range(2)
            ]
            assert (parts[0] == parts[1]).all() == (mode == "even"), tensor.output.name


def test_parallel_and_serial_residuals_of_neox(tmp_path: Path) -> None:
    for name, parallel in (("a", True), ("b", False)):
        config = layer_norm_config("gpt_neox", use_parallel_residual=parallel)
        source = write_checkpoint(tmp_path / name, config)
        tiny.grow(source, tmp_path / f"{name}1", layers="+2")
        assert verified(source, tmp_path / f"{name}1").max_difference == 0.0
        tiny.grow(source, tmp_path / f"{name}2", **EVERYTHING)
        assert verified(source, tmp_path / f"{name}2").passed


def test_gpt2_without_softmax_scale(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", layer_norm_config("gpt2", scale_attn_weights=False))
    plan = tiny.grow(source, tmp_path / "b", hidden="x2", head_dim="x2")
    assert plan.growth.key_factor == 1.0 and plan.exactness.value == "exact"
    assert verified(source, tmp_path / "b").passed


# -- files and config -----------------------------------------------------------------------------


def test_a_published_gpt2_file(tmp_path: Path) -> None:
    """Without prefix, with masks: read, and written without the prefix as well."""
    config = layer_norm_config("gpt2", tie_word_embeddings=True)
    source = write_checkpoint(tmp_path / "a", config)
    tiny.grow(source, tmp_path / "b", **EVERYTHING)
    file = source / "model.safetensors"
    bare = {k.removeprefix("transformer."): t.clone() for k, t in load_file(file).items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 128, 128).tril()}, file, {"format": "pt"})
    tiny.grow(source, tmp_path / "c", **EVERYTHING)
    assert verified(source, tmp_path / "c").passed
    with_prefix, without = tiny.read_folder(tmp_path / "b"), tiny.read_folder(tmp_path / "c")
    assert {f"transformer.{name}" for name in without} == with_prefix.keys()
    gains = [name for name in without if "ln_" in name]
    assert all(tiny.same_bits(without[n], with_prefix[f"transformer.{n}"]) for n in gains)
    tiny.grow(source, tmp_path / "d", hidden="x2", heads="x2", format="gpt2")
    assert verified(source, tmp_path / "d").passed


@pytest.mark.parametrize(
    ("stated", "request_", "expected"),
    [
        (None, {"layers": "+1"}, None),
        (None, {"hidden": "x2", "heads": "x2"}, 128),
        (None, {"hidden": "x2", "heads": "x2", "ffn": "x2"}, None),
        (None, {"ffn": "+4"}, 132),
        (128, {"layers": "+1"}, 128),
        (128, {"hidden": "x2", "heads": "x2"}, 128),
        (24, {"ffn": "x2"}, 48),
    ],
)
def test_n_inner_is_written_once_it_differs(
    tmp_path: Path, stated: int | None, request_: dict[str, Any], expected: int | None
) -> None:
    source = write_checkpoint(tmp_path / "a", layer_norm_config("gpt2", n_inner=stated))
    tiny.grow(source, tmp_path / "b", **request_)
    written = tiny.read_config(tmp_path / "b")
    assert written["n_inner"] == expected and "head_dim" not in written
    assert verified(source, tmp_path / "b").passed


def test_opt_config_and_its_constant_epsilon(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", layer_norm_config("opt"))
    plan = tiny.grow(source, tmp_path / "b", hidden="48", heads="+2")
    written = tiny.read_config(tmp_path / "b")
    assert written["word_embed_proj_dim"] == written["hidden_size"] == 48
    assert plan.growth.stream_factor == pytest.approx(1.5**0.5)
    assert "epsilon constant" in plan.growth.steps[-1].summary


@pytest.mark.parametrize("family", LAYER_NORM_FAMILIES)
@pytest.mark.parametrize(
    ("request_", "remedy"),
    [
        ({"hidden": "x2"}, "With --heads 8, or with --head-dim 16."),
        ({"hidden": "48"}, "With --heads 6, or with --head-dim 12."),
        ({"heads": "x2"}, "With --hidden 64."),
        ({"head_dim": "12"}, "With --hidden 48."),
    ],
)
def test_what_alone_would_not_load_is_refused_with_what_would(
    tmp_path: Path, family: str, request_: dict[str, Any], remedy: str
) -> None:
    source = write_checkpoint(tmp_path / "a", layer_norm_config(family))
    with open_checkpoint(source) as checkpoint, pytest.raises(UsageError) as refusal:
        build_plan(checkpoint, GrowthRequest(**request_).operators())
    assert refusal.value.remedy == remedy
    option, size = remedy.rstrip(".").split()[1:3]
    field = option.removeprefix("--").replace("-", "_")
    tiny.grow(source, tmp_path / "b", **request_, **{field: size.rstrip(",")})
    assert verified(source, tmp_path / "b").passed


@pytest.mark.parametrize("family", LAYER_NORM_FAMILIES)
def test_inspect_plan_and_diff(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = layer_norm_config(family, tie_word_embeddings=True)
    source = write_checkpoint(tmp_path / "a", config)
    assert main(["inspect", str(source), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["family"] == family and report["tied_embeddings"]
    assert main(["plan", str(source), "--hidden", "x2", "--heads", "x2", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(source)
    assert planned["before"]["parameters"] == model.num_parameters()
    tiny.grow(source, tmp_path / "b", **EVERYTHING)
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "b") as b:
        found = diff_checkpoints(a, b)
    assert found["as_grown"]
    texts = " ".join(group["text"] for group in found["groups"])
    assert "new (mean of the old)" in texts and "new (zero)" in texts
    embedding = family_of(config).tensor("embed")
    assert embedding is not None

    def spoil(tensors: Tensors) -> None:
        tensors[embedding.name][5, 70] += 1e-3

    change_tensors(tmp_path / "b", spoil)
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "b") as b:
        found = diff_checkpoints(a, b)
    assert not found["as_grown"]
    (changed,) = (g for g in found["groups"] if g["tensor"] == embedding.name)
    assert changed["differing"] == 1


# -- negative controls ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_an_epsilon_that_is_not_rescaled_fails(tmp_path: Path, family: str) -> None:
    source = write_checkpoint(tmp_path / "a", layer_norm_config(family))

    def small(tensors: Tensors) -> None:
        """A residual stream of 1e-2, where epsilon counts."""
        writers = ("wte", "wpe", "embed_in", "c_proj", "dense.", "dense_4h")
        for name in tensors:
            if any(word in name for word in writers):
                tensors[name] *= 0.05

    change_tensors(source, small)
    tiny.grow(source, tmp_path / "b", hidden="48", heads="+2")
    assert verified(source, tmp_path / "b").passed
    field = family_of({"model_type": family}).norm.eps_field
    assert field is not None
    change_config(tmp_path / "b", **{field: 1e-5})
    report = verified(source, tmp_path / "b")
    assert not report.passed and report.max_difference > 100 * report.tolerance


def zeros_for_means(tensors: Tensors) -> None:
    tensors["transformer.wte.weight"][:, 32:] = 0


def zeros_for_means_of_a_writer(tensors: Tensors) -> None:
    tensors["transformer.h.1.mlp.c_proj.weight"][:, 32:] = 0


def zero_for_the_mean_of_a_bias(tensors: Tensors) -> None:
    tensors["transformer.h.1.attn.c_proj.bias"][32:] = 0


def old_gain(tensors: Tensors) -> None:
    tensors["transformer.h.0.ln_1.weight"] *= 1.5**0.5


def old_final_bias(tensors: Tensors) -> None:
    tensors["transformer.ln_f.bias"] *= 2


def old_keys(tensors: Tensors) -> None:
    tensors["transformer.h.1.attn.c_attn.weight"][:, 48:96] /= 1.5**0.5


def old_key_bias(tensors: Tensors) -> None:
    """It moves no softmax by itself; turned by its position it does."""
    bias = tensors["gpt_neox.layers.1.attention.query_key_value.bias"].reshape(4, 3, 12)
    bias[:, 1] /= 1.5**0.5


def noise(size: int) -> torch.Tensor:
    return 0.3 * torch.randn(size, generator=torch.Generator().manual_seed(0))


def speaking_key_channel(tensors: Tensors) -> None:
    tensors["transformer.h.1.attn.c_attn.weight"][:, 48 + 11] = noise(48)


def read_value_channel(tensors: Tensors) -> None:
    tensors["transformer.h.1.attn.c_proj.weight"][11] = noise(48)


def speaking_block(tensors: Tensors) -> None:
    name = "gpt_neox.layers.1.attention.dense.bias"
    assert not tensors[name].any()
    tensors[name] = tensors[name.replace("layers.1", "layers.0")].clone()


def parts_of_heads_exchanged(tensors: Tensors) -> None:
    """All q, then all k: what other families do."""
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    rows = tensors[name].reshape(8, 3, 8, -1)
    tensors[name] = rows.transpose(0, 1).reshape(tensors[name].shape).contiguous()


def old_stream(tensors: Tensors) -> None:
    tensors["model.decoder.layers.1.fc2.weight"] /= 1.5**0.5


PADDED, CHANNELS = {"hidden": "48", "heads": "+2"}, {"hidden": "48", "head_dim": "12"}
BROKEN: dict[str, tuple[str, dict[str, Any], Callable[[Tensors], None]]] = {
    "embedding": ("gpt2", PADDED, zeros_for_means),
    "writer": ("gpt2", PADDED, zeros_for_means_of_a_writer),
    "bias of a writer": ("gpt2", PADDED, zero_for_the_mean_of_a_bias),
    "gain": ("gpt2", PADDED, old_gain),
    "bias of the final norm": ("gpt2", {"hidden": "x2", "heads": "x2"}, old_final_bias),
    "keys": ("gpt2", CHANNELS, old_keys),
    "bias of keys": ("gpt_neox", CHANNELS, old_key_bias),
    "key channel": ("gpt2", CHANNELS, speaking_key_channel),
    "value channel": ("gpt2", CHANNELS, read_value_channel),
    "identity block": ("gpt_neox", {"layers": "+1", "layer_placement": "0"}, speaking_block),
    "order": ("gpt_neox", {"hidden": "x2", "heads": "x2"}, parts_of_heads_exchanged),
    "stream": ("opt", PADDED, old_stream),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_growth_fails(tmp_path: Path, name: str) -> None:
    family, request, change = BROKEN[name]
    source = write_checkpoint(tmp_path / "a", layer_norm_config(family, tie_word_embeddings=True))
    tiny.grow(source, tmp_path / "b", **request)
    change_tensors(tmp_path / "b", change)
    report = verified(source, tmp_path / "b")
    assert not report.passed and report.max_difference > 100 * report.tolerance


def test_the_rotated_part_has_to_stay(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", layer_norm_config("gpt_neox"))
    tiny.grow(source, tmp_path / "b", **CHANNELS)
    assert verified(source, tmp_path / "b").passed
    rope = tiny.read_config(source)["rope_parameters"]
    change_config(tmp_path / "b", rope_parameters=rope)
    assert not verified(source, tmp_path / "b").passed


def test_heads_that_change_their_order_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Query heads interleaved, key/value heads tiled: a query then meets other keys."""
    make = AxisMap.grouped
    source = write_checkpoint(tmp_path / "a", layer_norm_config("gpt_neox"))
    monkeypatch.setattr("growkit.surgery.compose.check_links", lambda *arguments: None)
    monkeypatch.setattr(
        "growkit.surgery.operators.heads._members",
        lambda groups, width: np.tile(np.arange(len(groups) // 2), 2),
    )
    assert make(4, 8, 1).source.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    tiny.grow(source, tmp_path / "b", hidden="x2", heads="x2")
    assert not verified(source, tmp_path / "b").passed


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [PADDED, CHANNELS], ids=["hidden and heads", "channels"])
@pytest.mark.parametrize("family", LAYER_NORM_FAMILIES)
def test_every_new_parameter_learns_within_two_steps(
    tmp_path: Path, family: str, request_: dict[str, Any]
) -> None:
    source = write_checkpoint(tmp_path / "a", layer_norm_config(family))
    plan = tiny.grow(source, tmp_path / "b", **request_)
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
        seen = reached[tensor.output.name.replace("embed_out", "lm_head")]
        for axis, dim in enumerate(tensor.dims):
            for start, end in dim.new_ranges if dim is not None else []:
                part = seen.narrow(axis, start, end - start)
                if tensor.role in ("embed", "positions"):  # what does not occur
                    part = part[(part != 0).any(1)]
                    assert len(part)
                # A bias of keys changes no softmax; ReLU units may be dead on a short text.
                least = 0.3 if "bias" in tensor.role or family == "opt" else 0.95
                assert (part != 0).float().mean() > least, tensor.output.name
