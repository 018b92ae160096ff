"""Every operator through transformers on the written files; a wrong one is caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

from growkit.core.errors import VerificationFailed
from growkit.modeling import GdaConfig
from growkit.surgery.axis_map import AxisMap
from growkit.verification import VerificationReport, verify_checkpoints

SMALL: dict[str, Any] = {"tokens": 64, "window": 32, "generate_tokens": 4}
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "head_dim": 8}
Break = Callable[[tiny.Tensors], None]

GDA = tiny.gda_config(4, 2, 1, **SIZES)
GDA_POLY = tiny.gda_config(4, 2, 2, **SIZES, hidden_act="poly_norm")
GDA_TIED = tiny.gda_config(4, 2, 2, **SIZES, tie_word_embeddings=True)
GDA_SHARED = tiny.gda_config(4, 2, 2, own=False, **SIZES, sub_layer_norm=False)
GDA_1_1 = tiny.gda_config(4, 4, 2, **SIZES)
GDA_1_2 = tiny.gda_config(2, 4, 2, **SIZES)
LLAMA = tiny.llama_config(4, 2, **SIZES)
LLAMA_TIED = tiny.llama_config(4, 2, **SIZES, tie_word_embeddings=True, attention_bias=True)
DIFFLLAMA = tiny.diffllama_config(8, 4, **SIZES)

EXACT: dict[str, tuple[tiny.Config, dict[str, Any]]] = {
    "signal-copy": (GDA, {"signal_heads": "x2"}),
    "signal-even-thirds": (GDA_1_1, {"signal_heads": "x3", "symmetry": "even"}),
    "signal-noise-shares": (GDA, {"signal_heads": "x2", "symmetry": "noise"}),
    "signal-zero": (GDA, {"signal_heads": "+2", "new_heads": "zero"}),
    "signal-shared-keys": (GDA_SHARED, {"signal_heads": "x2"}),
    "noise": (tiny.gda_config(8, 2, 1, **SIZES), {"noise_heads": "x2"}),
    "noise-below-1:1": (GDA_1_1, {"noise_heads": "x3"}),
    "noise-through-1:1": (GDA, {"noise_heads": "x4"}),
    "noise-below-1:2": (GDA_1_2, {"noise_heads": "x2"}),
    "noise-shared-keys": (GDA_SHARED, {"noise_heads": "x4"}),
    "uniform": (GDA, {"uniform_heads": "x2"}),
    "uniform-odd": (GDA_1_1, {"uniform_heads": "x1.5"}),
    "uniform-1:2": (GDA_1_2, {"uniform_heads": "x2"}),
    "depth": (GDA, {"layers": "+3"}),
    "ffn": (GDA, {"ffn": "+7"}),
    "ffn-zero": (GDA, {"ffn": "+7", "new_units": "zero"}),
    "ffn-poly-norm": (GDA_POLY, {"ffn": "x3"}),
    "hidden": (GDA_POLY, {"hidden": "x2"}),
    "hidden-tied": (GDA_TIED, {"hidden": "x2"}),
    "untie": (GDA_TIED, {"untie_embeddings": True, "hidden": "x3"}),
    "everything": (
        GDA_POLY | {"tie_word_embeddings": True},
        {"untie_embeddings": True, "signal_heads": "x4", "noise_heads": "x2", "ffn": "x2"}
        | {"hidden": "x2", "layers": "+1"},
    ),
    "llama": (LLAMA, {"ffn": "x1.5", "hidden": "x2", "layers": "+2"}),
    "llama-tied": (LLAMA_TIED, {"ffn": "x2", "hidden": "x2", "layers": "+1"}),
    "diffllama-depth": (DIFFLLAMA, {"layers": "5", "layer_placement": "0,0,1"}),
    "diffllama-signal": (DIFFLLAMA, {"signal_heads": "x2", "layers": "+1"}),
    "diffllama-noise": (DIFFLLAMA, {"noise_heads": "x2"}),
    "diffllama-uniform": (DIFFLLAMA, {"uniform_heads": "x2", "ffn": "x2", "hidden": "x2"}),
}


def verified(a: Path, b: Path) -> VerificationReport:
    return verify_checkpoints(a, b, **SMALL)


@pytest.mark.parametrize("case", EXACT)
def test_growth_keeps_the_function(tmp_path: Path, case: str) -> None:
    config, request = EXACT[case]
    source = tiny.make_folder(tmp_path / "a", config)
    tiny.grow(source, tmp_path / "b", **request)
    report = verified(source, tmp_path / "b")
    assert report.passed, report.cause
    assert report.max_difference < 1e-4
    if report.exactness == "bit-exact":
        assert report.max_difference < 1e-6


@pytest.mark.parametrize("case", ["signal-copy", "depth", "uniform-odd", "hidden", "ffn"])
def test_bfloat16_checkpoints_stay_exact(tmp_path: Path, case: str) -> None:
    """The shares sum bit for bit, so nothing is lost in a 16-bit checkpoint."""
    config, request = EXACT[case]
    source = tiny.make_folder(tmp_path / "a", config, "BF16", shards=2)
    tiny.grow(source, tmp_path / "b", **request)
    report = verified(source, tmp_path / "b")
    assert report.passed and report.max_difference < 1e-4


# -- negative controls: each breaks one promise of one operator -----------------------------------


def signal_tile(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        AxisMap, "grouped", staticmethod(lambda size, new, groups: AxisMap.tile(size, new // size))
    )


def swap_noise_heads(tensors: tiny.Tensors) -> None:
    """Four groups of (2 signal, 1 noise): exchange the noise heads of the first and last."""
    q = tensors["model.layers.1.self_attn.q_proj.weight"].reshape(4, 3, 8, -1)
    q[[0, 3], 2] = q[[3, 0], 2]


def drop_a_share(tensors: tiny.Tensors) -> None:
    tensors["model.layers.0.self_attn.o_proj.weight"][:, :16] *= 0


def whole_copies(tensors: tiny.Tensors) -> None:
    """Forget to share: both copies of a unit carry the whole weight."""
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    down *= 2


def exchange_shares(tensors: tiny.Tensors) -> None:
    """o_proj columns in another order than the heads."""
    o = tensors["model.layers.0.self_attn.o_proj.weight"]
    o[:] = np.roll(o, 32, axis=1)


def computing_block(tensors: tiny.Tensors) -> None:
    o = tensors["model.layers.1.self_attn.o_proj.weight"]
    assert not o.any()
    o[:] = tensors["model.layers.0.self_attn.o_proj.weight"]


def zero_output_forgotten(tensors: tiny.Tensors) -> None:
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert not down[:, 24:].any()
    down[:, 24:] = 0.1


def final_norm_forgotten(tensors: tiny.Tensors) -> None:
    tensors["model.norm.weight"] *= 2


def uneven_copy(tensors: tiny.Tensors) -> None:
    """PolyNorm: the second copy of one unit is silenced at both ends, so only the norm sees it."""
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"][24] = 0
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    down[:, 0] += down[:, 24]
    down[:, 24] = 0


def old_lambdas(source: tiny.Tensors) -> Break:
    def change(tensors: tiny.Tensors) -> None:
        for name in tensors:
            if "lambda_" in name:
                tensors[name] = source[name]

    return change


BROKEN: dict[str, tuple[str, Break]] = {
    "a share is lost": ("signal-copy", drop_a_share),
    "o columns exchanged": ("signal-copy", exchange_shares),
    "noise heads exchanged": ("noise", swap_noise_heads),
    "uniform shares lost": ("uniform", drop_a_share),
    "identity block computes": ("depth", computing_block),
    "llama block computes": ("llama", lambda t: computing_block(t)),
    "FFN not shared": ("ffn", whole_copies),
    "new units speak": ("ffn-zero", zero_output_forgotten),
    "PolyNorm, uneven": ("ffn-poly-norm", uneven_copy),
    "tied without factor": ("hidden-tied", final_norm_forgotten),
}


def rewrite(folder: Path, change: Break) -> None:
    """Apply ``change`` to the written tensors of a folder, in place."""
    tensors, side = tiny.read_folder(folder), folder / "growkit.json"
    config, manifest = tiny.read_config(folder), side.read_text()
    change(tensors)
    other = folder.with_name(folder.name + "-broken")
    tiny.write_folder(other, config, tensors)
    (other / "growkit.json").write_text(manifest)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_growth_fails(tmp_path: Path, case: str) -> None:
    name, change = BROKEN[case]
    config, request = EXACT[name]
    request = {"layers": "+2"} if case == "llama block computes" else request
    source = tiny.make_folder(tmp_path / "a", config)
    tiny.grow(source, tmp_path / "b", **request)
    if case == "identity block computes":
        tiny.grow(source, tmp_path / "c", layers="+1", layer_placement="0")
    folder = tmp_path / ("c" if case == "identity block computes" else "b")
    rewrite(folder, change)
    report = verified(source, folder.with_name(folder.name + "-broken"))
    assert not report.passed
    assert report.max_difference > 10 * report.tolerance
    with pytest.raises(VerificationFailed) as failure:
        report.raise_if_failed()
    assert failure.value.exit_code == 3


def test_tiled_signal_heads_do_not_leave_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiling moves copies to other noise heads: already refused on paper."""
    source = tiny.make_folder(tmp_path / "a", GDA)
    signal_tile(monkeypatch)
    with pytest.raises(Exception, match="would move signal heads to other noise heads"):
        tiny.grow(source, tmp_path / "b", signal_heads="x2")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("request_", [{"signal_heads": "x2"}, {"uniform_heads": "x2"}])
def test_tiled_heads_fail_on_the_written_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: dict[str, str]
) -> None:
    """The same with the check on paper switched off: verification is a second net."""
    source = tiny.make_folder(tmp_path / "a", tiny.gda_config(4, 2, 2, **SIZES))
    signal_tile(monkeypatch)
    monkeypatch.setattr("growkit.surgery.compose.check_links", lambda *arguments: None)
    tiny.grow(source, tmp_path / "b", **request_)
    assert not verified(source, tmp_path / "b").passed


def test_lambda_not_divided_fails(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", GDA_1_1)
    tiny.grow(source, tmp_path / "b", noise_heads="x2")
    rewrite(tmp_path / "b", old_lambdas(tiny.read_folder(source)))
    assert not verified(source, tmp_path / "b-broken").passed


@pytest.mark.parametrize("forgotten", ["lambda", "scale"])
def test_diffllama_depth_needs_both_corrections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    source = tiny.make_folder(tmp_path / "a", DIFFLLAMA)
    if forgotten == "lambda":
        monkeypatch.setattr(
            "growkit.surgery.execute.change_lambda",
            lambda *v: tuple(np.asarray(x, np.float32) for x in v[:4]),
        )
    else:
        monkeypatch.setattr("growkit.surgery.lambdas.LambdaChange.scale_factor", 1.0)
    tiny.grow(source, tmp_path / "b", layers="5", layer_placement="0,0,1")
    assert not verified(source, tmp_path / "b").passed


def test_methods_that_are_not_exact_say_so_and_are_not(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", GDA)
    plan = tiny.grow(source, tmp_path / "b", layers="x2", depth_method="stack")
    assert plan.exactness.value == "not-exact"
    assert any("does not keep the function" in warning for warning in plan.warnings)
    report = verified(source, tmp_path / "b")
    assert report.max_difference > 0.01


# -- Motif through our own model, and DiffLlama made by transformers ------------------------------


def as_gda(folder: Path, target: Path) -> Path:
    """The same tensors under the config that ours reads a Motif config as."""
    config = GdaConfig.from_motif(tiny.read_config(folder)).to_dict()
    config["dtype"] = "float32"
    tensors = {
        name: array.astype(np.float32) if array.dtype != np.float32 else array
        for name, array in tiny.read_folder(folder).items()
    }
    return tiny.write_folder(target, config, tensors)


@pytest.mark.parametrize(
    ("config", "request_"),
    [
        (tiny.motif_config(4, 4, 2, **SIZES), {"layers": "+2", "layer_placement": "0,0"}),
        (tiny.motif_config(4, 4, 2, **SIZES), {"signal_heads": "x4", "hidden": "x2", "ffn": "x2"}),
        (tiny.motif_config(8, 4, 2, **SIZES), {"noise_heads": "x2"}),
        (
            tiny.motif_config(4, 4, 2, **SIZES) | {"num_noise_heads": 4},
            {"uniform_heads": "x2", "layers": "+1"},
        ),
        (
            tiny.motif_config(2, 2, 1, **SIZES, tie_word_embeddings=True),
            {"untie_embeddings": True, "hidden": "x2", "ffn": "x2", "signal_heads": "x4"}
            | {"layers": "+1"},
        ),
    ],
)
def test_motif_keeps_its_function_and_format(
    tmp_path: Path, config: tiny.Config, request_: dict[str, Any]
) -> None:
    source = tiny.make_folder(tmp_path / "a", config)
    plan = tiny.grow(source, tmp_path / "b", **request_)
    assert plan.family.name == "motif"
    assert tiny.read_config(tmp_path / "b")["model_type"] == "Motif"
    ours = as_gda(source, tmp_path / "a-gda"), as_gda(tmp_path / "b", tmp_path / "b-gda")
    report = verified(*ours)
    assert report.passed and report.max_difference < 1e-4, report.cause


def test_motif_becomes_ours_on_request(tmp_path: Path) -> None:
    source = tiny.make_folder(tmp_path / "a", tiny.motif_config(4, 4, 2, **SIZES))
    tiny.grow(source, tmp_path / "b", signal_heads="x2", layers="+1", format="gda")
    config = tiny.read_config(tmp_path / "b")
    assert config["model_type"] == "gda" and config["num_noise_heads"] == 4
    report = verified(as_gda(source, tmp_path / "a-gda"), tmp_path / "b")
    assert report.passed, report.cause


@pytest.fixture(scope="module")
def diffllama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made and saved by transformers; the eps is its class default, and matters."""
    torch.manual_seed(0)
    config = DiffLlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.12,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("diffllama") / "source"
    model = DiffLlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def test_diffllama_grows_in_depth_in_its_own_format(diffllama: Path, tmp_path: Path) -> None:
    plan = tiny.grow(diffllama, tmp_path / "b", layers="4")
    again = tiny.grow(tmp_path / "b", tmp_path / "c", layers="5", layer_placement="0")
    assert plan.family.name == again.family.name == "diffllama"
    for grown in ("b", "c"):
        report = verified(diffllama, tmp_path / grown)
        assert report.passed and report.max_difference < 1e-4, report.cause


def test_diffllama_signal_heads_become_ours(diffllama: Path, tmp_path: Path) -> None:
    plan = tiny.grow(diffllama, tmp_path / "b", signal_heads="x2")
    assert plan.family.name == "gda"
    assert any("written as gda" in warning for warning in plan.warnings)
    config = tiny.read_config(tmp_path / "b")
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_gda.GdaForCausalLM"
    assert (tmp_path / "b" / "modeling_gda.py").is_file()
    assert config["rms_norm_eps"] == config["attn_rms_norm_eps"] == 1e-5
    report = verified(diffllama, tmp_path / "b")
    assert report.passed and report.max_difference < 1e-4, report.cause

    old, new = tiny.read_folder(diffllama), tiny.read_folder(tmp_path / "b")
    at, d = "model.layers.1.self_attn.", 4
    q = old[at + "q_proj.weight"].reshape(2, 4, d, 32)  # halves: (signal, noise), 4 heads
    grown_q = new[at + "q_proj.weight"].reshape(4, 3, d, 32)  # groups of (2 signal, 1 noise)
    assert (grown_q[:, 0] == q[0]).all() and (grown_q[:, 1] == q[0]).all()
    assert (grown_q[:, 2] == q[1]).all()
    for name in ("k_proj", "v_proj"):  # (part, pair) -> (pair, part)
        rows = old[at + f"{name}.weight"].reshape(2, 2, d, 32)
        assert (new[at + f"{name}.weight"].reshape(2, 2, d, 32) == rows.swapaxes(0, 1)).all()
    o = new[at + "o_proj.weight"].reshape(32, 4, 2, 2 * d).astype(np.float64)
    assert (o.sum(axis=2) == old[at + "o_proj.weight"].reshape(32, 4, 2 * d)).all()
    assert (new[at + "subln.weight"] == 1).all() and new[at + "subln.weight"].shape == (2 * d,)


def test_a_diffllama_config_that_leaves_out_its_eps(diffllama: Path, tmp_path: Path) -> None:
    """Its class assumes 1e-5 where ours assumes 1e-6."""
    config = tiny.read_config(diffllama)
    config.pop("rms_norm_eps", None)
    tiny.write_folder(tmp_path / "a", config, tiny.read_folder(diffllama))
    tiny.grow(tmp_path / "a", tmp_path / "b", signal_heads="x2")
    grown = tiny.read_config(tmp_path / "b")
    assert grown["rms_norm_eps"] == grown["attn_rms_norm_eps"] == 1e-5
    assert verified(diffllama, tmp_path / "b").passed
