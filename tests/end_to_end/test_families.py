"""Every ordinary family: written by transformers, grown, loaded by transformers, compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import BIASES, FAMILIES, family_config, fitting, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from growkit.cli.main import main
from growkit.core.errors import CheckpointError, UsageError
from growkit.families import family_of
from growkit.growing import grow_checkpoint
from growkit.surgery import source_checks
from growkit.surgery.plan import Plan
from growkit.surgery.request import GrowthRequest
from growkit.verification import verify_checkpoints

Tensors = dict[str, torch.Tensor]
TABLES = {family: family_of(family_config(family)) for family in FAMILIES}
POST_NORM = [family for family, table in TABLES.items() if table.tensor("attention_post_norm")]
PATTERNED = [family for family, table in TABLES.items() if table.layer_rules]
GEMMA = [family for family, table in TABLES.items() if table.sqrt_embedding_scale]


@dataclass(frozen=True)
class Case:
    """One growth. ``kv`` of 4 query heads; ``shards`` counts the source's files."""

    request: dict[str, Any]
    tied: bool = False
    bias: bool = False
    kv: int = 2
    dtype: torch.dtype = torch.float32
    shards: int = 1
    config: dict[str, Any] = field(default_factory=dict)


# Every operator, spread over {tied, untied} x {bias, none} x {MHA, GQA, MQA} x {one file, more}.
CASES: dict[str, Case] = {
    "layers-tied": Case({"layers": "+2"}, tied=True, bias=True),
    "layers-mqa": Case({"layers": "7", "layer_placement": "0,0,3"}, kv=1),
    "ffn-tied": Case({"ffn": "x1.5"}, tied=True, kv=4),
    "ffn-new-units": Case({"ffn": "+7", "new_units": "zero"}, bias=True),
    "hidden-tied": Case({"hidden": "x2"}, tied=True, bias=True, shards=3),
    "hidden-thirds": Case({"hidden": "x3"}, tied=True),
    "hidden-untied": Case({"hidden": "x4"}, bias=True, kv=1),
    "untie": Case({"untie_embeddings": True, "hidden": "x2"}, tied=True),
    "together": Case({"ffn": "+9", "hidden": "x2", "layers": "+3"}, bias=True, shards=2),
    "bfloat16": Case(
        {"ffn": "x2", "hidden": "x2", "layers": "+1"}, tied=True, dtype=torch.bfloat16
    ),
}


def source_of(path: Path, family: str, case: Case) -> Path:
    config = family_config(
        family,
        bias=case.bias and family in BIASES,
        tie_word_embeddings=case.tied,
        num_key_value_heads=case.kv,
        **case.config,
    )
    folder = write_checkpoint(path, config, case.dtype)
    if case.shards > 1:
        _shard(folder, case.shards)
    return folder


def _shard(folder: Path, count: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(count):
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[shard::count])
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def grow(source: Path, out: Path, verify: bool = True, **request: Any) -> tuple[Plan, Any]:
    return grow_checkpoint(source, out, GrowthRequest(**request), verify=verify, threads=1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_growth_keeps_the_function(tmp_path: Path, family: str, name: str) -> None:
    case = CASES[name]
    source = source_of(tmp_path / "a", family, case)
    plan, manifest = grow(source, tmp_path / "b", **fitting(family, case.request))
    figures = manifest["verification"]
    assert figures["passed"]
    if set(case.request) <= {"layers", "layer_placement"}:
        assert plan.exactness.value == "bit-exact"
        assert figures["max_difference"] == 0.0
    elif case.dtype == torch.float32:
        assert figures["max_difference"] < 2e-5
    elif family not in GEMMA:
        # Shares sum bit for bit and a half is representable: bfloat16 loses nothing.
        assert plan.exactness.value == "exact"
        assert figures["max_difference"] < 2e-5
    else:
        assert plan.exactness.value == "rounded"
        assert figures["max_difference"] < 0.05


@pytest.mark.parametrize("family", GEMMA)
def test_gemma_times_four_is_exact_in_bfloat16(tmp_path: Path, family: str) -> None:
    """sqrt(4) is a power of two, and the final gain is kept in float32."""
    source = source_of(tmp_path / "a", family, Case({}, tied=True, dtype=torch.bfloat16))
    plan, manifest = grow(source, tmp_path / "b", hidden="x4")
    assert plan.exactness.value == "exact"
    assert manifest["verification"]["max_difference"] < 2e-5
    assert not plan.warnings
    plan, _ = grow(source, tmp_path / "c", False, hidden="x2")
    assert "bfloat16 compute" in plan.warnings[0]


@pytest.mark.parametrize("method", ["stack", "interpolate", "solar"])
@pytest.mark.parametrize("family", FAMILIES)
def test_repeated_layers_are_the_old_ones(tmp_path: Path, family: str, method: str) -> None:
    """Another function, but the one that the plan says: the same as stacking modules in torch."""
    source = source_of(tmp_path / "a", family, Case({}, config={"num_hidden_layers": 4}))
    target = {"stack": "8", "interpolate": "7", "solar": "6"}[method]
    plan, _ = grow(source, tmp_path / "b", layers=target, depth_method=method)
    assert plan.exactness.value == "not-exact"
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    old = AutoModelForCausalLM.from_pretrained(source).eval()
    sources = [layer.source for layer in plan.growth.layers]
    config = AutoConfig.from_pretrained(tmp_path / "b")
    for name in ("layer_types", "no_rope_layers"):
        if hasattr(old.config, name):
            entries = getattr(old.config, name)
            assert getattr(config, name) == [entries[i] for i in sources]
    built = AutoModelForCausalLM.from_config(config).eval()
    built.load_state_dict({**old.state_dict(), **built.state_dict()} | _shared(old, built))
    for new, layer in zip(built.model.layers, sources, strict=True):
        new.load_state_dict(old.model.layers[layer].state_dict())
    ids = torch.arange(64)[None] * 3 % 256
    with torch.no_grad():
        assert torch.equal(grown(ids).logits, built(ids).logits)


def _shared(old: Any, new: Any) -> Tensors:
    """What stands outside the layers."""
    names = new.state_dict()
    return {n: t for n, t in old.state_dict().items() if ".layers." not in n and n in names}


# -- layers of several kinds ----------------------------------------------------------------------


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Change fields; None takes a field out, as published configs leave it out."""
    config = config_of(folder) | changes
    gone = {name for name, value in changes.items() if value is None}
    kept = {name: value for name, value in config.items() if name not in gone}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("family", PATTERNED)
def test_a_list_that_the_config_leaves_out(tmp_path: Path, family: str) -> None:
    """Spread evenly, layers leave the order that the class would make; theirs is written out."""
    windows: dict[str, Any] = {"num_hidden_layers": 5}
    if family.startswith("qwen"):
        windows |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
    source = source_of(tmp_path / "a", family, Case({}, config=windows))
    rewrite_config(source, layer_types=None, no_rope_layers=None)
    before = AutoConfig.from_pretrained(source)
    plan, manifest = grow(source, tmp_path / "b", layers="+3", layer_placement="even")
    assert manifest["verification"]["max_difference"] == 0.0
    # max_window_layers counts on, so Qwen's order holds.
    alternate = any("layers alternate" in warning for warning in plan.warnings)
    assert alternate != family.startswith("qwen")
    after = AutoConfig.from_pretrained(tmp_path / "b")
    name = "no_rope_layers" if family == "smollm3" else "layer_types"
    assert name in config_of(tmp_path / "b")
    old = getattr(before, name)
    assert getattr(after, name) == [old[layer.source] for layer in plan.growth.layers]
    # Negative control: left to the class, the list is another one, and it shows.
    broken = tmp_path / "c"
    shutil.copytree(tmp_path / "b", broken)
    windows = {"max_window_layers": 0} if family.startswith("qwen") else {}
    rewrite_config(broken, **{name: None}, **windows)
    report = verify_checkpoints(source, broken, tokens=64, window=32, generate_tokens=2)
    assert not report.passed and report.max_difference > 100 * report.tolerance


def test_a_uniform_list_that_the_class_would_make_stays_out(tmp_path: Path) -> None:
    source = source_of(tmp_path / "a", "qwen3", Case({}))
    rewrite_config(source, layer_types=None)
    grow(source, tmp_path / "b", layers="+1")
    assert "layer_types" not in config_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("request_", "before", "after"),
    [
        ({"layers": "+2", "layer_placement": "0,1"}, 2, 4),
        ({"layers": "+2", "layer_placement": "end"}, 2, 2),
        ({"layers": "+2"}, 4, 6),
        ({"layers": "+2"}, 28, 28),
        ({"layers": "x2", "depth_method": "stack"}, 2, 2),
    ],
)
def test_max_window_layers_counts_on(
    tmp_path: Path, request_: dict[str, Any], before: int, after: int
) -> None:
    source = source_of(tmp_path / "a", "qwen2", Case({}, config={"max_window_layers": before}))
    grow(source, tmp_path / "b", **request_)
    assert config_of(tmp_path / "b")["max_window_layers"] == after


# -- negative controls: each breaks one promise of one family -------------------------------------


def closed_without_offset(tensors: Tensors) -> None:
    """A stored zero is a gain of one in Gemma."""
    for name in tensors:
        if "post_" in name and (tensors[name] == -1).all():
            tensors[name].zero_()


def final_norm_without_offset(tensors: Tensors) -> None:
    """w / sqrt(2) instead of (1 + w) / sqrt(2) - 1."""
    gain = (tensors["model.norm.weight"] + 1) * 2**0.5
    tensors["model.norm.weight"] = (gain - 1) / 2**0.5


def final_norm_by_the_whole_factor(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = (tensors["model.norm.weight"] + 1) / 2**0.5 - 1


def embedding_not_divided(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"] *= 2**0.5


def open_post_norm(tensors: Tensors) -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    assert not tensors[name].any()
    tensors[name] = tensors["model.layers.0.post_attention_layernorm.weight"].clone()


def keys_and_values_exchanged(tensors: Tensors) -> None:
    name = "model.layers.0.self_attn.qkv_proj.weight"
    q, k, v = tensors[name].split([32, 16, 16])
    tensors[name] = torch.cat([q, v, k])


def gate_and_up_exchanged(tensors: Tensors) -> None:
    name = "model.layers.0.mlp.gate_up_proj.weight"
    tensors[name] = torch.cat(tensors[name].chunk(2)[::-1])


def lost_bias(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.k_proj.bias"].zero_()
    tensors["model.layers.1.self_attn.q_proj.bias"].zero_()


def lost_head_norm(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_norm.weight"].fill_(1)


def speaking_bias(tensors: Tensors) -> None:
    name = "model.layers.1.mlp.down_proj.bias"
    assert not tensors[name].any()
    tensors[name] = tensors["model.layers.0.mlp.down_proj.bias"].clone()


GROWN_DEEP = {"layers": "+1", "layer_placement": "0"}
BROKEN: dict[str, tuple[str, Case, Callable[[Tensors], None]]] = {
    "gemma2 closed at 0": ("gemma2", Case(GROWN_DEEP), closed_without_offset),
    "gemma3 closed at 0": ("gemma3", Case(GROWN_DEEP), closed_without_offset),
    "gemma2 final norm": ("gemma2", Case({"hidden": "x2"}, True), final_norm_without_offset),
    "gemma3 final norm": ("gemma3", Case({"hidden": "x2"}, True), final_norm_without_offset),
    "gemma3 tied": ("gemma3", Case({"hidden": "x2"}, True), final_norm_by_the_whole_factor),
    "gemma3 embedding": ("gemma3", Case({"hidden": "x2"}), embedding_not_divided),
    "olmo2 open": ("olmo2", Case(GROWN_DEEP), open_post_norm),
    "phi3 qkv": ("phi3", Case({"hidden": "x2"}), keys_and_values_exchanged),
    "phi3 gate_up": ("phi3", Case({"ffn": "x2"}), gate_and_up_exchanged),
    "qwen2 bias": ("qwen2", Case({"ffn": "x2"}), lost_bias),
    "qwen3 head norm": ("qwen3", Case({"ffn": "x2"}), lost_head_norm),
    "granite bias": ("granite", Case(GROWN_DEEP, bias=True), speaking_bias),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_growth_fails(tmp_path: Path, name: str) -> None:
    family, case, change = BROKEN[name]
    source = source_of(tmp_path / "a", family, case)
    grow(source, tmp_path / "b", False, **case.request)
    file = tmp_path / "b" / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    report = verify_checkpoints(source, tmp_path / "b", tokens=64, window=32, generate_tokens=2)
    assert not report.passed
    assert report.max_difference > 100 * report.tolerance


# -- identity blocks under a norm have to be trainable --------------------------------------------


def first_gradient(folder: Path, layer: int) -> float:
    """Norm of the first gradient of one layer's parameters."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(64)[None] * 7 % 256
    model(input_ids=ids, labels=ids).loss.backward()
    squares = [p.grad.square().sum() for p in model.model.layers[layer].parameters()]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("family", POST_NORM)
def test_identity_blocks_close_the_norm_and_not_the_projection(tmp_path: Path, family: str) -> None:
    """Both are exact; only a closed norm has a first gradient that a learning rate can scale."""
    source = source_of(tmp_path / "a", family, Case({}))
    plan, _ = grow(source, tmp_path / "b", **GROWN_DEEP)
    assert [layer.kind for layer in plan.growth.layers][1] == "identity"
    file = "model.safetensors"
    tensors = {k: t.clone() for k, t in load_file(tmp_path / "b" / file).items()}
    for projection in ("self_attn.o_proj", "mlp.down_proj"):
        name = f"model.layers.{{}}.{projection}.weight"
        assert torch.equal(tensors[name.format(1)], tensors[name.format(0)])
        tensors[name.format(1)].zero_()
    for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
        name = f"model.layers.{{}}.{norm}.weight"
        assert (tensors[name.format(1)] == (-1.0 if family in GEMMA else 0.0)).all()
        tensors[name.format(1)] = tensors[name.format(0)].clone()
    zeroed = shutil.copytree(tmp_path / "b", tmp_path / "c")
    save_file(tensors, zeroed / file, {"format": "pt"})
    report = verify_checkpoints(source, zeroed, tokens=64, window=32, generate_tokens=2)
    assert report.passed and report.max_difference == 0.0
    gradient = first_gradient(tmp_path / "b", 1)
    assert 0 < gradient < 1
    assert first_gradient(zeroed, 1) > 100 * gradient


# -- config and folder ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_published_configs_with_silent_fields(tmp_path: Path, family: str) -> None:
    """Fields that the class fills in may be absent, and head_dim is written once it matters."""
    source = source_of(tmp_path / "a", family, Case({}, tied=family in (*GEMMA, "smollm3")))
    silent = {"tie_word_embeddings": None}
    if family not in ("qwen3", *GEMMA):
        silent["head_dim"] = None
    rewrite_config(source, **silent)
    _, manifest = grow(source, tmp_path / "b", hidden="x2", layers="+1")
    assert manifest["verification"]["passed"]
    written = config_of(tmp_path / "b")
    assert written["head_dim"] == 8 and "tie_word_embeddings" not in written
    changed = {n for n, v in written.items() if config_of(source).get(n) != v}
    assert changed <= {"head_dim", "hidden_size", "num_hidden_layers", "layer_types", "growkit"} | {
        "no_rope_layers",
        "max_window_layers",
    }


def test_granite_multipliers_stay(tmp_path: Path) -> None:
    source = source_of(tmp_path / "a", "granite", Case({}))
    grow(source, tmp_path / "b", False, hidden="x4")
    before, after = config_of(source), config_of(tmp_path / "b")
    for name in ("embedding", "attention", "residual"):
        assert before[f"{name}_multiplier"] == after[f"{name}_multiplier"]
    assert before["logits_scaling"] == after["logits_scaling"]


def test_phi3_long_context_factors_are_refused_in_the_plan(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    source = source_of(
        tmp_path / "a",
        "phi3",
        Case({}, config={"rope_parameters": rope, "partial_rotary_factor": 1.0}),
    )
    with pytest.raises(UsageError, match="Phi3Config wants 8 numbers") as refused:
        grow(source, tmp_path / "b", hidden="x2")
    assert refused.value.remedy == "With --query-heads 8 beside the hidden size."
    _, manifest = grow(source, tmp_path / "b", hidden="x2", query_heads="8")
    assert manifest["verification"]["passed"]
    _, manifest = grow(source, tmp_path / "c", layers="+1", ffn="x2")
    assert manifest["verification"]["passed"]


def store_head(folder: Path, change: float = 0.0) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += change
    save_file({**tensors, "lm_head.weight": head}, file, {"format": "pt"})


@pytest.mark.parametrize("request_", [{"hidden": "x2"}, {"untie_embeddings": True}])
def test_a_stored_copy_of_a_tied_head(tmp_path: Path, request_: dict[str, Any]) -> None:
    source = source_of(tmp_path / "a", "llama", Case({}, tied=True))
    store_head(source)
    plan, manifest = grow(source, tmp_path / "b", **request_)
    assert manifest["verification"]["passed"]
    assert any("lm_head.weight is stored" in warning for warning in plan.warnings)
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert ("lm_head.weight" in written) == ("untie_embeddings" in request_)


@pytest.mark.parametrize("piece", [1 << 22, 1000])
def test_a_tied_head_that_differs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(source_checks, "PIECE_BYTES", piece)
    source = source_of(tmp_path / "a", "llama", Case({}, tied=True))
    store_head(source, change=1e-3)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored and differs"):
        grow(source, tmp_path / "b", ffn="x2")
    assert not (tmp_path / "b").exists()
    # transformers itself does not tie them: with the remedy followed, growth is exact.
    rewrite_config(source, tie_word_embeddings=False)
    _, manifest = grow(source, tmp_path / "c", ffn="x2")
    assert manifest["verification"]["passed"]


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_and_plan(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = source_of(tmp_path / "a", family, Case({}, tied=True))
    assert main(["inspect", str(source), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["family"] == family
    assert {"--layers", "--ffn", "--hidden"} <= set(report["can_grow"])
    assert "--signal-heads" not in report["can_grow"]
    assert main(["plan", str(source), "--layers", "+1", "--hidden", "x2", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(source)
    assert planned["before"]["parameters"] == model.num_parameters()
    assert main(["plan", str(source), "--signal-heads", "x2"]) == 2
    assert "no signal heads" in " ".join(capsys.readouterr().err.split())
