"""Experts through transformers on the written files: upcycling, more of them, other growth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from expert_checkpoints import DENSE, LAYOUTS, SOURCES, changed, source_folder, verified
from family_checkpoints import family_config, write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import UsageError
from growkit.record.manifest import read_manifest
from growkit.surgery.plan import Plan, build_plan
from growkit.surgery.request import GrowthRequest

TOGETHER = {"heads": "x2", "ffn": "x1.5", "layers": "+1", "hidden": "x2"}
# Request -> exactness, for a model that has experts already.
MORE: dict[str, tuple[dict[str, Any], str]] = {
    "twice": ({"experts": "x2"}, "exact"),
    "twice, noise": ({"experts": "8", "symmetry": "noise"}, "rounded"),
    "three times": ({"experts": "x3"}, "rounded"),
    "three times, even": ({"experts": "x3", "symmetry": "even"}, "exact"),
    "with everything": (TOGETHER | {"experts": "x2"}, "exact"),
    "other growth": (TOGETHER, "exact"),
    "new units": ({"ffn": "x2", "new_units": "zero"}, "bit-exact"),
    "depth": ({"layers": "+3"}, "bit-exact"),
}


def planned(source: Path, **request: Any) -> Plan:
    asked = GrowthRequest(**request)
    with open_checkpoint(source) as checkpoint:
        return build_plan(checkpoint, asked.operators(), target=asked.format)


def loads_without_a_word(folder: Path) -> Any:
    """The model, once transformers took every tensor and missed none."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


# -- exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MORE)
@pytest.mark.parametrize("name", SOURCES)
def test_a_model_with_experts_keeps_its_function(
    tmp_path: Path, name: str, case: str, layout: str
) -> None:
    request, exactness = MORE[case]
    source = source_folder(tmp_path / "a", name, layout)
    plan = tiny.grow(source, tmp_path / "b", **request)
    assert plan.exactness.value == exactness
    loads_without_a_word(tmp_path / "b")
    report = verified(source, tmp_path / "b")
    assert report.passed and report.max_difference < 2e-5, report.cause
    # Nothing is added to bit-exact models but zeros; the product's own order depends on where the
    # file happens to lie in memory.
    assert report.max_difference < 1e-6 or exactness != "bit-exact"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize("per_token", [None, 1, 3, 8])
@pytest.mark.parametrize("family", DENSE)
def test_a_dense_model_becomes_one_with_experts(
    tmp_path: Path, family: str, per_token: int | None, dtype: torch.dtype
) -> None:
    source = source_folder(tmp_path / "a", family, dtype=dtype)
    plan = tiny.grow(source, tmp_path / "b", experts="8", experts_per_token=per_token)
    assert plan.exactness.value == "exact"
    config = loads_without_a_word(tmp_path / "b").config
    assert config.num_experts_per_tok == (per_token or 2) and config.num_local_experts == 8
    report = verified(source, tmp_path / "b")
    assert report.passed and report.max_difference < 2e-5, report.cause


@pytest.mark.parametrize("family", DENSE)
def test_upcycling_with_every_other_operator_and_again(tmp_path: Path, family: str) -> None:
    tied = family_config(family, tie_word_embeddings=True, num_hidden_layers=2)
    source = write_checkpoint(tmp_path / "a", tied)
    tiny.grow(source, tmp_path / "b", experts="4", untie_embeddings=True, **TOGETHER)
    tiny.grow(tmp_path / "b", tmp_path / "c", experts="x2", ffn="x2")
    loads_without_a_word(tmp_path / "c")
    for grown in ("b", "c"):
        report = verified(source, tmp_path / grown)
        assert report.passed and report.max_difference < 2e-5, report.cause


@pytest.mark.parametrize(("layers", "dense"), [("1-3", [0]), ("0, 2", [1]), ("0-3", [])])
def test_chosen_layers_get_experts(tmp_path: Path, layers: str, dense: list[int]) -> None:
    source = source_folder(tmp_path / "a", "qwen3", dtype=torch.bfloat16)
    request = {"layers": "+1", "heads": "x2", "hidden": "x2"}
    tiny.grow(source, tmp_path / "b", experts="4", expert_layers=layers, **request)
    config = loads_without_a_word(tmp_path / "b").config
    assert config.mlp_only_layers == dense and config.num_experts == 4
    report = verified(source, tmp_path / "b")
    assert report.passed and report.max_difference < 2e-5, report.cause

    def alter(tensors: tiny.Tensors) -> None:
        place = "mlp.down_proj" if dense else "mlp.experts.1.down_proj"
        tensors[f"model.layers.0.{place}.weight"][:] *= 1.5

    if dense != [1]:
        assert not verified(source, changed(tmp_path / "b", alter)).passed


def test_configs_say_what_the_dense_class_assumed(tmp_path: Path) -> None:
    """Mixtral assumes another rope_theta, norm eps and window than the dense classes."""
    for family in DENSE:
        config = family_config(family)
        config.pop("sliding_window", None)
        source = write_checkpoint(tmp_path / family, config)
        silent = tiny.read_config(source)
        for name in ("rope_parameters", "rms_norm_eps", "sliding_window", "layer_types"):
            silent.pop(name, None)
        if family == "llama":
            silent["sliding_window"] = 4  # LlamaConfig ignores it
        tensors = tiny.read_folder(source)
        silent_folder = tiny.write_folder(tmp_path / f"{family}-silent", silent, tensors)
        out = tmp_path / f"{family}-grown"
        tiny.grow(silent_folder, out, experts="4")
        before, after = (AutoConfig.from_pretrained(f) for f in (silent_folder, out))
        assert after.rope_parameters == before.rope_parameters
        assert after.rms_norm_eps == before.rms_norm_eps
        windows = (getattr(c, "sliding_window", None) for c in (before, after))
        assert next(windows) == next(windows) or family == "llama"
        assert getattr(after, "sliding_window", None) != 4
        assert verified(silent_folder, out).passed


@pytest.mark.parametrize(
    ("family", "request_", "message"),
    [
        ("gemma2", {}, "norms behind each block"),
        ("gemma3", {}, "a Gemma 4 norms values"),
        ("llama", {"expert_layers": "1"}, "mixtral has experts in every layer"),
        ("qwen3", {"expert_layers": "1-3"}, "'1-3' is no layer, or range of layers, of 0 to 1"),
        ("qwen3", {"expert_layers": "1,x"}, "'x' is no layer"),
        ("qwen3", {"expert_layers": "1", "ffn": "x2"}, "widths of their own"),
        ("qwen3_moe", {"expert_layers": "1"}, "has experts already"),
        ("mixtral", {"expert_width": 8}, "has experts already"),
        ("llama", {"expert_width": 7}, "7 does not divide the 24 FFN units .* Widths .* 6, 8, 12"),
        ("llama", {"expert_width": 8}, "3 experts of 8 units make one FFN, and 8 is no .* 6 or 9"),
        ("llama", {"expert_width": 12, "experts_per_token": 3}, "by chance. Ask for 2 or 4 or 6"),
        ("llama", {"expert_width": 12, "expert_reinit": 0.5}, "12 units is a part of one"),
        ("llama", {"expert_width": 12, "ffn": "x2"}, "dealt out to experts and widened"),
        ("llama", {"shared_expert_width": 12}, "has no shared expert"),
        ("qwen2", {"shared_expert_width": 32}, "the FFN has 24 units"),
        ("qwen2", {"ffn": "x2"}, "dealt out to experts and widened"),
        ("phi3", {}, "rotates 0.5 of every head"),
    ],
)
def test_what_no_class_holds_is_refused_in_a_sentence(
    tmp_path: Path, family: str, request_: dict[str, str], message: str
) -> None:
    source = source_folder(tmp_path / "a", family)
    with pytest.raises(UsageError, match=message):
        planned(source, experts="8", **request_)


# -- negative controls --------------------------------------------------------------------------

Break = Callable[[tiny.Tensors], None]


def one_expert_altered(tensors: tiny.Tensors) -> None:
    tensors["model.layers.0.block_sparse_moe.experts.3.w2.weight"][:] *= 1.5


def expert_stack_altered(tensors: tiny.Tensors) -> None:
    tensors["model.layers.0.mlp.experts.down_proj"][5] *= 1.5


def router_rows_exchanged(tensors: tiny.Tensors) -> None:
    """The copy of expert 0 under the router row of expert 1, and the other way round."""
    router = tensors["model.layers.0.mlp.gate.weight"]
    router[[4, 5]] = router[[5, 4]]


def share_not_multiplied(tensors: tiny.Tensors) -> None:
    tensors["model.layers.0.mlp.experts.2.down_proj.weight"][:] /= 2


def nothing(tensors: tiny.Tensors) -> None:
    pass


BROKEN: dict[str, tuple[str, str, dict[str, Any], Break, dict[str, Any]]] = {
    "an expert differs": ("llama", "separate", {"experts": "4"}, one_expert_altered, {}),
    "an expert of a stack": ("mixtral", "fused", {"experts": "x2"}, expert_stack_altered, {}),
    "router rows exchanged": (
        "qwen3_moe",
        "separate",
        {"experts": "x2"},
        router_rows_exchanged,
        {},
    ),
    "a share lost": ("qwen3_moe", "separate", {"experts": "x2"}, share_not_multiplied, {}),
    "top-k not grown": (
        "mixtral",
        "separate",
        {"experts": "x2", "symmetry": "even"},
        nothing,
        {"num_experts_per_tok": 2},
    ),
    "weights not renormalised": (
        "qwen3",
        "separate",
        {"experts": "4"},
        nothing,
        {"norm_topk_prob": False},
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_growth_fails(tmp_path: Path, case: str) -> None:
    name, layout, request, change, config = BROKEN[case]
    source = source_folder(tmp_path / "a", name, layout)
    tiny.grow(source, tmp_path / "b", **request)
    assert verified(source, tmp_path / "b").passed
    report = verified(source, changed(tmp_path / "b", change, **config))
    assert not report.passed and report.max_difference > 10 * report.tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"experts": "+2"}, "6 experts are not a whole multiple of 4"),
        ({"experts": "x2", "experts_per_token": 2}, "top-k 2 instead of 4"),
        ({"experts": "4", "experts_per_token": 3}, "top-k 3 instead of 2"),
    ],
)
def test_growth_that_is_not_exact_says_so_and_is_not(
    tmp_path: Path, request_: dict[str, Any], why: str, layout: str
) -> None:
    source = source_folder(tmp_path / "a", "mixtral", layout)
    plan = tiny.grow(source, tmp_path / "b", **request_)
    assert plan.exactness.value == "not-exact"
    assert any(why in warning for warning in plan.warnings)
    loads_without_a_word(tmp_path / "b")
    assert verified(source, tmp_path / "b").max_difference > 1e-3


# -- what is refused ----------------------------------------------------------------------------


LONGROPE = {
    "partial_rotary_factor": 1.0,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.5, 3.0, 4.0],
    },
}


@pytest.mark.parametrize(
    ("family", "config", "request_", "cause"),
    [
        ("llama", {"attention_bias": True}, {"experts": "4"}, "MixtralConfig has none"),
        ("llama", {"mlp_bias": True}, {"experts": "4"}, "biases (mlp_bias)"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            {"experts": "4"},
            "one attention window for all",
        ),
        ("gemma2", {}, {"experts": "4"}, "holds a gemma2 model with experts"),
        ("phi3", LONGROPE, {"experts": "4"}, "its rotary frequencies change with the length"),
        ("llama", {}, {"experts": "1"}, "one expert is the FFN itself"),
        ("llama", {}, {"experts": "4", "experts_per_token": 5}, "5 of 4 experts"),
        ("llama", {}, {"experts": "4", "experts_per_token": 0}, "0 of 4 experts"),
        ("llama", {}, {"experts": "4", "format": "llama"}, "'llama' cannot hold a llama"),
        ("llama", {}, {"experts": "4", "ffn": "+1"}, "a multiple of 4, and 25 is none (24 or 28"),
        ("mixtral", {}, {"experts": "2"}, "fewer than the 4"),
        ("mixtral", {}, {"ffn": "+1"}, "a multiple of 4, and 25 is none"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, {"ffn": "+8"}, "one number for two widths"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    tmp_path: Path, family: str, config: dict[str, Any], request_: dict[str, Any], cause: str
) -> None:
    values = family_config(family, **(TWO_LAYERS | config))
    source = write_checkpoint(tmp_path / "a", values)
    with pytest.raises(UsageError) as refusal:
        planned(source, **request_)
    assert cause in refusal.value.cause and refusal.value.remedy


TWO_LAYERS = {"num_hidden_layers": 2}


@pytest.mark.parametrize("width", [24, 25])
def test_widths_are_refused_where_transformers_cannot_run_them(tmp_path: Path, width: int) -> None:
    """The bound of the grouped matrix product is real: a model with such a width fails."""
    values = family_config("mixtral", intermediate_size=width, **TWO_LAYERS)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    ids = torch.zeros(1, 4, dtype=torch.long)
    if width % 4:
        with pytest.raises(RuntimeError, match="16 bytes"):
            model(ids)
    else:
        model(ids)


# -- what else is written -------------------------------------------------------------------------


def test_the_layout_on_disk_stays(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        source = source_folder(tmp_path / layout, "mixtral", layout)
        tiny.grow(source, tmp_path / f"{layout}-b", experts="x2", layers="+1")
        names = tiny.read_folder(tmp_path / f"{layout}-b").keys()
        stacked = "model.layers.2.mlp.experts.gate_up_proj" in names
        assert stacked == (layout == "fused")
        assert ("model.layers.2.block_sparse_moe.experts.7.w1.weight" in names) != stacked


def test_the_number_of_experts_keeps_its_name(tmp_path: Path) -> None:
    """Published configs say num_experts, transformers 5 writes num_local_experts; both load."""
    written, kept = "num_experts", "num_local_experts"
    source = source_folder(tmp_path / "a", "qwen3_moe")
    config = tiny.read_config(source)
    assert config[kept] == 4 and written not in config
    tiny.grow(source, tmp_path / "b", experts="x2")
    grown = tiny.read_config(tmp_path / "b")
    assert grown[kept] == 8 and written not in grown
    config[written] = config.pop(kept)
    other = tiny.write_folder(tmp_path / "c", config, tiny.read_folder(source))
    tiny.grow(other, tmp_path / "d", experts="x2")
    grown = tiny.read_config(tmp_path / "d")
    assert grown[written] == 8 and kept not in grown
    assert verified(other, tmp_path / "d").passed


def test_inserted_layers_break_a_period_and_the_list_says_it(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "a", "qwen3_moe, every second layer")
    tiny.grow(source, tmp_path / "b", layers="+1", layer_placement="0")
    config = tiny.read_config(tmp_path / "b")
    assert config["decoder_sparse_step"] == 1 and config["mlp_only_layers"] == [0, 1, 3]
    tiny.grow(source, tmp_path / "c", hidden="x2")
    config = tiny.read_config(tmp_path / "c")
    assert config["decoder_sparse_step"] == 2 and config["mlp_only_layers"] == []


def test_new_parameters_of_experts(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "a", "llama")
    plan = tiny.grow(source, tmp_path / "b", experts="4", ffn="x2")
    new = _new(tmp_path / "b")
    moe = "model.layers.1.block_sparse_moe."
    assert new[moe + "gate.weight"] == "all"
    assert new[moe + "experts.0.w1.weight"] == {"rows": [[24, 48]]}
    assert all(new[f"{moe}experts.{e}.w2.weight"] == "all" for e in (1, 2, 3))
    assert {t.role for t in plan.tensors if t.source is None} == {"router"}
    for layout in LAYOUTS:
        moe_source = source_folder(tmp_path / layout, "mixtral", layout)
        tiny.grow(moe_source, tmp_path / f"{layout}-b", experts="x2")
    assert _new(tmp_path / "separate-b")[moe + "gate.weight"] == {"rows": [[4, 8]]}
    fused = _new(tmp_path / "fused-b")
    assert fused["model.layers.1.mlp.experts.down_proj"] == {"experts": [[4, 8]]}
    assert fused["model.layers.1.mlp.gate.weight"] == {"rows": [[4, 8]]}


def _new(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = (read_manifest(folder) or {})["new_parameters"]
    return found


def test_a_fresh_router_is_random_and_the_experts_are_equal(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "a", "llama")
    tiny.grow(source, tmp_path / "b", experts="4", seed=1)
    tiny.grow(source, tmp_path / "c", experts="4", seed=2)
    b, c = tiny.read_folder(tmp_path / "b"), tiny.read_folder(tmp_path / "c")
    old = tiny.read_folder(source)
    for layer in range(2):
        at = f"model.layers.{layer}."
        router = b[at + "block_sparse_moe.gate.weight"]
        assert 0.08 < router.std() < 0.16 and not np.allclose(router[0], router[1])
        assert (router != c[at + "block_sparse_moe.gate.weight"]).any()
        for expert in range(4):
            found = b[f"{at}block_sparse_moe.experts.{expert}.w2.weight"]
            assert tiny.same_bits(found, old[at + "mlp.down_proj.weight"])
