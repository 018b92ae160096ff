"""What a plan says: counts against the models that transformers makes, and configs that load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import growkit.modeling  # noqa: F401  (registers the gda model)
from growkit.checkpoint import open_checkpoint
from growkit.core.errors import CheckpointError, UsageError
from growkit.record.plan_report import plan_report, tensor_report
from growkit.surgery.plan import Plan, build_plan, declare_tensors
from growkit.surgery.request import GrowthRequest

GROWTHS: dict[str, tuple[tiny.Config, dict[str, Any]]] = {
    "gda": (tiny.gda_config(), {"signal_heads": "x2", "layers": "+2", "hidden": "x2"}),
    "gda-tied-poly": (
        tiny.gda_config(tie_word_embeddings=True, hidden_act="poly_norm"),
        {"ffn": "x2", "noise_heads": "x2"},
    ),
    "gda-shared": (tiny.gda_config(own=False, sub_layer_norm=False), {"uniform_heads": "x2"}),
    "gda-untied": (tiny.gda_config(tie_word_embeddings=True), {"untie_embeddings": True}),
    "llama": (tiny.llama_config(attention_bias=True, mlp_bias=True), {"layers": "3", "ffn": "+4"}),
    "llama-hidden": (tiny.llama_config(tie_word_embeddings=True), {"hidden": "x2"}),
    "diffllama": (tiny.diffllama_config(), {"layers": "3", "hidden": "x2"}),
    "diffllama-signal": (tiny.diffllama_config(), {"signal_heads": "x3"}),
}


def made_plan(folder: Path, **request: Any) -> Plan:
    asked = GrowthRequest(**request)
    with open_checkpoint(folder, require_tensors=False) as checkpoint:
        if not checkpoint.tensors:
            declare_tensors(checkpoint)
        return build_plan(
            checkpoint,
            asked.operators(),
            symmetry=asked.symmetry_choice(),
            target=asked.format,
        )


def cache_bytes(model: Any) -> int:
    """Bytes that one more token adds to the cache of a float32 model."""

    def stored(tokens: int) -> int:
        with torch.no_grad():
            cache = model(torch.arange(tokens)[None], use_cache=True).past_key_values
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in tensors)

    return stored(5) - stored(4)


@pytest.mark.parametrize("case", GROWTHS)
def test_numbers_are_those_of_the_loaded_models(tmp_path: Path, case: str) -> None:
    config, request = GROWTHS[case]
    source = tiny.make_folder(tmp_path / "a", config)
    report = plan_report(tiny.grow(source, tmp_path / "b", **request))
    for folder, side in (("a", "before"), ("b", "after")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        figures = report[side]
        parameters = sum(p.numel() for p in model.parameters())  # tied parameters count once
        outer = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        embeddings = sum(p.numel() for p in {id(p): p for p in outer}.values())
        assert figures["parameters"] == parameters
        assert figures["non_embedding_parameters"] == parameters - embeddings
        assert figures["kv_cache_bytes_per_token"] == cache_bytes(model)
        assert figures["dtype"] == "F32"
    assert report["bytes_in"] == 4 * report["before"]["parameters"]
    assert report["bytes_out"] == 4 * report["after"]["parameters"]
    stored = sum(t.nbytes for t in tiny.read_folder(tmp_path / "b").values())
    assert report["bytes_out"] == stored


@pytest.mark.parametrize("signal", [1, 2, 6])
def test_flops_are_counted_by_hand(tmp_path: Path, signal: int) -> None:
    """Two per weight met, and scores and values of every map over half of the context."""
    config = tiny.gda_config(2 * signal, 2, 2, num_hidden_layers=3)
    folder = tiny.make_folder(tmp_path / "a", config)
    figures = plan_report(made_plan(folder, layers="+1"))["before"]
    heads, d, context = 2 * signal + 2, 4, 512
    matrices = 16 * (heads * d + 2 * 4 * d + 2 * signal * 2 * d) + 3 * 16 * 12
    vectors = 4 * d + 2 * d + 2 * 16
    attention = heads * (2 * d + 2 * 2 * d) * context // 2
    expected = 3 * (2 * (matrices + vectors) + attention) + 2 * 16 + 2 * 256 * 16
    assert figures["context"] == context
    assert figures["flops_per_token"] == expected


@pytest.mark.parametrize("case", GROWTHS)
def test_written_configs_pass_transformers_validation(tmp_path: Path, case: str) -> None:
    config, request = GROWTHS[case]
    source = tiny.make_folder(tmp_path / "a", config, "BF16")
    plan = tiny.grow(source, tmp_path / "b", **request)
    loaded = AutoConfig.from_pretrained(tmp_path / "b")
    sizes = plan.sizes
    assert loaded.num_hidden_layers == sizes["layer"]
    assert loaded.hidden_size == sizes["hidden"]
    assert loaded.intermediate_size == sizes["ffn"]
    assert loaded.head_dim == 4
    heads = sizes.get("query_head") or sizes["signal_head"] + sizes["noise_head"]
    assert loaded.num_attention_heads == heads
    assert loaded.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "again")
    block = tiny.read_config(tmp_path / "again")["growkit"]
    assert block == tiny.read_config(tmp_path / "b")["growkit"]
    assert block["grown"] == request


def test_fields_that_growth_does_not_touch_stay_in_their_order(tmp_path: Path) -> None:
    config = tiny.llama_config() | {"my_field": {"kept": [1, 2]}, "layer_types": ["a", "b"]}
    source = tiny.make_folder(tmp_path / "a", config)
    tiny.grow(source, tmp_path / "b", layers="4", layer_placement="0,1")
    before, after = tiny.read_config(source), tiny.read_config(tmp_path / "b")
    assert after["layer_types"] == ["a", "a", "b", "b"]
    changed = {k for k in before if after[k] != before[k]}
    assert changed == {"num_hidden_layers", "layer_types"}
    assert [k for k in after if k in before] == list(before)


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize(
    ("signal", "noise", "request_", "expected"),
    [
        (8, 4, {"noise_heads": "x2"}, (16, 8)),
        (4, 4, {"uniform_heads": "x2"}, (16, 8)),
        (4, 4, {"signal_heads": "x2"}, (12, 4)),
        (4, 4, {"layers": "+1"}, (8, 4)),
    ],
)
def test_motif_configs_keep_their_noise_heads_right(
    tmp_path: Path,
    signal: int,
    noise: int,
    request_: dict[str, str],
    expected: tuple[int, int],
    stated: bool,
) -> None:
    """The format lets num_noise_heads out at 1:1, where it means half of the heads."""
    config = tiny.motif_config(signal, noise)
    if stated:
        config["num_noise_heads"] = noise
    source = tiny.make_folder(tmp_path / "a", config)
    tiny.grow(source, tmp_path / "b", **request_)
    grown = tiny.read_config(tmp_path / "b")
    heads = grown["num_attention_heads"]
    assert (heads, grown.get("num_noise_heads", heads // 2)) == expected


def test_a_config_alone_can_be_planned(tmp_path: Path) -> None:
    config, request = GROWTHS["gda"]
    whole = tiny.make_folder(tmp_path / "whole", config, "BF16")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((whole / "config.json").read_bytes())
    expected, got = (made_plan(folder, **request) for folder in (whole, alone))
    names = {e["name"]: (e["action"], e["shape"], e["source_shape"]) for e in tensor_report(got)}
    assert names == {
        e["name"]: (e["action"], e["shape"], e["source_shape"]) for e in tensor_report(expected)
    }
    assert plan_report(got)["after"]["parameters"] == plan_report(expected)["after"]["parameters"]


def test_actions_say_what_happens_to_a_tensor(tmp_path: Path) -> None:
    folder = tiny.make_folder(tmp_path / "a", tiny.gda_config())
    entries = {e["name"]: e for e in tensor_report(made_plan(folder, signal_heads="x2"))}
    at = "model.layers.0.self_attn."
    grown = {name for name, entry in entries.items() if entry["action"] == "grown"}
    assert grown == {
        f"model.layers.{i}.self_attn.{n}_proj.weight" for i in range(2) for n in ("q", "o")
    }
    assert entries[at + "k_proj.weight"]["action"] == "copied"
    assert entries[at + "q_proj.weight"]["source_shape"] == [24, 16]
    assert entries[at + "q_proj.weight"]["shape"] == [40, 16]


EXACTNESS = [
    ({"signal_heads": "x2"}, "exact"),
    ({"signal_heads": "+2", "new_heads": "zero"}, "bit-exact"),
    ({"noise_heads": "x2"}, "bit-exact"),
    ({"noise_heads": "x4"}, "exact"),
    ({"layers": "+1"}, "bit-exact"),
    ({"layers": "+1", "signal_heads": "x2"}, "exact"),
    ({"signal_heads": "x2", "symmetry": "even"}, "exact"),
    ({"signal_heads": "x3", "symmetry": "even"}, "rounded"),
    ({"signal_heads": "x2", "symmetry": "noise"}, "rounded"),
    ({"noise_heads": "x2", "symmetry": "noise"}, "bit-exact"),
    ({"layers": "x2", "depth_method": "stack"}, "not-exact"),
    ({"layers": "3", "depth_method": "interpolate", "ffn": "x2"}, "not-exact"),
]


@pytest.mark.parametrize(("request_", "expected"), EXACTNESS)
def test_exactness_is_that_of_the_worst_part(
    tmp_path: Path, request_: dict[str, Any], expected: str
) -> None:
    folder = tiny.make_folder(tmp_path / "a", tiny.gda_config())
    plan = made_plan(folder, **request_)
    assert plan.exactness.value == expected
    tied_for_ever = any("equal for ever" in warning for warning in plan.warnings)
    assert tied_for_ever == (request_.get("symmetry") == "even")


@pytest.mark.parametrize(
    ("config", "request_", "message"),
    [
        (tiny.llama_config(), {"signal_heads": "x2"}, "no signal heads"),
        (tiny.gda_config(2, 4), {"signal_heads": "x2"}, "--uniform-heads"),
        (tiny.gda_config(4, 2), {"signal_heads": "x1.3"}, r"6 \(x1.5\), 8 \(x2\)"),
        (tiny.gda_config(4, 2), {"noise_heads": "3"}, "Possible: 4, or a multiple of 4"),
        (tiny.gda_config(8, 2), {"noise_heads": "x3"}, "Possible: 4, 8, or a multiple of 8"),
        (tiny.gda_config(8, 2), {"noise_heads": "x1.3"}, "Possible: 4, 8, or a multiple of 8"),
        (tiny.gda_config(4, 2), {"noise_heads": "1"}, "fewer than the 2"),
        (tiny.gda_config(4, 2), {"uniform_heads": "x1.5"}, r"12 \(x2\)"),
        (tiny.gda_config(hidden_act="poly_norm"), {"ffn": "+1"}, "multiple of 12"),
        (
            tiny.gda_config(hidden_act="poly_norm"),
            {"ffn": "x2", "new_units": "zero"},
            "PolyNorm",
        ),
        (tiny.gda_config(), {"hidden": "24", "hidden_method": "tile"}, r"32 \(x2\)"),
        (tiny.gda_config(), {"untie_embeddings": True}, "are not tied"),
        (tiny.gda_config(), {"layers": "+2", "layer_placement": "0"}, "1 positions for 2"),
        (tiny.gda_config(), {"layers": "+1", "layer_placement": "2"}, "layers 0 to 1"),
        (tiny.gda_config(), {"layers": "3", "depth_method": "stack"}, r"4 \(x2\)"),
        (tiny.gda_config(), {"layers": "5", "depth_method": "solar"}, "even number"),
        (tiny.gda_config(3, 2), {"layers": "+1"}, "2 noise heads do not divide 3"),
        (tiny.gda_config(4, 2, 3), {"layers": "+1"}, "3 key/value pairs do not divide"),
        (tiny.gda_config(num_key_value_heads=3), {"layers": "+1"}, "even number"),
        (tiny.motif_config(num_key_value_heads=1), {"layers": "+1"}, "even number"),
        (tiny.gda_config(noise_keys="both"), {"layers": "+1"}, "'own' and 'shared'"),
        (tiny.gda_config(lambda_init=[0.2]), {"layers": "+1"}, "one number a layer"),
        (tiny.llama_config(layer_types=["a"]), {"layers": "+1"}, "1 entries in layer_types"),
        (tiny.diffllama_config(5, 4), {"layers": "+1"}, "even number of both"),
        (tiny.diffllama_config(hidden_act="gelu"), {"signal_heads": "x2"}, "hidden_act = 'gelu'"),
    ],
)
def test_impossible_requests_say_what_is_possible(
    tmp_path: Path, config: tiny.Config, request_: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        made_plan(folder, **request_)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"signal_heads": "x2"}, "the diffllama format cannot hold this model"),
        ({"signal_heads": "x2", "format": "gda"}, "the diffllama format cannot hold this model"),
        ({"ffn": "x2", "format": "gda"}, "asked for"),
    ],
)
def test_why_another_format_is_written(tmp_path: Path, request_: dict[str, Any], why: str) -> None:
    plan = made_plan(tiny.make_folder(tmp_path / "a", tiny.diffllama_config()), **request_)
    assert plan.warnings[0] == f"{why}: it is written as gda"


def test_weights_that_disagree_with_the_config_are_refused(tmp_path: Path) -> None:
    config = tiny.gda_config()
    tensors = tiny.make_tensors(config)
    name = "model.layers.1.mlp.up_proj.weight"
    cases = {
        "missing": ({n: t for n, t in tensors.items() if n != name}, "is missing"),
        "shape": (tensors | {name: tensors[name][:-1]}, r"has shape \[11, 16\]"),
        "unknown": (
            tensors | {"model.layers.0.mlp.gate_proj.bias": tensors[name][0]},
            "is not part of",
        ),
    }
    for case, (changed, message) in cases.items():
        folder = tiny.write_folder(tmp_path / case, config, changed)
        with pytest.raises(CheckpointError, match=message):
            made_plan(folder, layers="+1")
