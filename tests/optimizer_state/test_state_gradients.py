"""The rule itself: the map of the moments takes the old model's gradients to the grown model's."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from state_runs import GDA, LLAMA, Run, gradients, grow, load, run, stored

from growkit.checkpoint import open_checkpoint
from growkit.surgery.axis_map import NEW
from growkit.surgery.plan import build_plan
from growkit.surgery.request import GrowthRequest
from growkit.surgery.tensor_plans import TensorPlan

TIED = tiny.llama_config(4, 2, tie_word_embeddings=True)
STEP = 50


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Run] = {}
    configs = {"gda": GDA, "llama": LLAMA, "tied": TIED}
    configs["biased"] = tiny.llama_config(4, 2, attention_bias=True, mlp_bias=True)
    configs["poly"] = GDA | {"hidden_act": "poly_norm"}
    configs["deep"] = GDA | {"num_noise_heads": 4, "num_attention_heads": 8}

    def get(name: str) -> Run:
        if name not in made:
            made[name] = run(tmp_path_factory.mktemp(name) / "run", configs[name])
        return made[name]

    return get


def mapped(source: Run, tmp_path: Path, **request: Any) -> tuple[dict[str, Any], Any, Any]:
    """(mapped gradients and squares, gradients of the grown model, manifest's optimizer_state):
    the source's gradients are put in the place of its moments and grown."""
    gradient = gradients(source.model, STEP)
    state = copy.deepcopy(source.optimizer.state_dict())
    for position, value in enumerate(gradient.values()):
        state["state"][position] |= {"exp_avg": value, "exp_avg_sq": value**2}
    folder = tmp_path / "with-gradients"
    folder.mkdir()
    for path in source.folder.iterdir():
        if path.name != "optimizer.pt":
            os.link(path, folder / path.name)
    torch.save(state, folder / "optimizer.pt")
    manifest = grow(folder, tmp_path / "grown", **request)
    return stored(tmp_path / "grown"), gradients(load(tmp_path / "grown"), STEP), manifest


def plans(source: Run, **request: Any) -> dict[str, TensorPlan]:
    asked = GrowthRequest(**request)
    with open_checkpoint(source.folder) as checkpoint:
        plan = build_plan(checkpoint, asked.operators(), symmetry=asked.symmetry_choice())
    return {tensor.output.name: tensor for tensor in plan.tensors}


def old_slots(tensor: TensorPlan) -> torch.Tensor:
    """Entries with a source in every dimension."""
    mask = torch.ones(tensor.output.shape, dtype=torch.bool)
    for axis, dim in enumerate(tensor.dims):
        if dim is not None:
            known = torch.from_numpy(np.repeat(dim.source != NEW, dim.block))
            shape = [1] * mask.ndim
            shape[axis] = -1
            mask &= known.view(shape)
    return mask


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


EXACT = [
    ("gda", {"signal_heads": "x2"}),
    ("gda", {"signal_heads": "+2"}),
    ("gda", {"signal_heads": "+2", "new_heads": "zero"}),
    ("gda", {"uniform_heads": "x2"}),
    ("gda", {"ffn": "x2"}),
    ("gda", {"ffn": "+5"}),
    ("gda", {"hidden": "x2"}),
    ("gda", {"layers": "+1", "signal_heads": "x2", "ffn": "x2", "hidden": "x2"}),
    ("poly", {"ffn": "x2", "signal_heads": "x2"}),
    ("llama", {"heads": "x2"}),
    ("llama", {"heads": "+2", "hidden": "x3"}),
    ("llama", {"query_heads": "x2"}),
    ("llama", {"ffn": "x2", "new_units": "zero"}),
    ("llama", {"hidden": "x2", "heads": "x2", "ffn": "x3"}),
    ("tied", {"hidden": "x2"}),
    ("tied", {"hidden": "x2", "hidden_method": "pad"}),
    ("gda", {"hidden": "+8", "signal_heads": "x2"}),
    ("biased", {"hidden": "x2", "heads": "x2", "ffn": "x2"}),
]


@pytest.mark.parametrize(("name", "request_"), EXACT, ids=lambda v: str(v))
def test_even_growth_maps_gradients_exactly(
    name: str, request_: dict[str, Any], sources: Any, tmp_path: Path
) -> None:
    source = sources(name)
    state, new, manifest = mapped(source, tmp_path, symmetry="even", **request_)
    told = manifest["optimizer_state"]
    assert told["exact"]
    fresh = set(new) - set(state)
    assert fresh == {n for n in new if ".layers.2." in n}  # nothing but an inserted layer
    tensors = plans(source, symmetry="even", **request_)
    for tensor_name, moments in state.items():
        known = old_slots(tensors[tensor_name])
        true = new[tensor_name] * known
        assert deviation(moments["exp_avg"], true) < 1e-11, tensor_name
        assert deviation(moments["exp_avg_sq"], true**2) < 1e-11, tensor_name
        assert not moments["exp_avg"][~known].any() and not moments["exp_avg_sq"][~known].any()


def test_wrong_factor_is_seen(sources: Any, tmp_path: Path) -> None:
    """Negative control: moments copied without the factor are not the gradients."""
    source = sources("llama")
    state, new, _ = mapped(source, tmp_path, symmetry="even", heads="x2")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert deviation(2 * state[name]["exp_avg"], new[name]) > 0.9
    name = "model.layers.0.self_attn.o_proj.weight"
    assert deviation(state[name]["exp_avg"] / 2, new[name]) > 0.4


@pytest.mark.parametrize(
    ("name", "request_", "role"),
    [
        ("gda", {"noise_heads": "x2"}, "q"),
        ("llama", {"kv_heads": "x2"}, "k"),
        ("llama", {"kv_heads": "x2"}, "v"),
    ],
    ids=str,
)
def test_sum_rule_where_copies_serve_different_heads(
    name: str, request_: dict[str, Any], role: str, sources: Any, tmp_path: Path
) -> None:
    """Only the sum over the copies is the old gradient; the estimate keeps that sum."""
    source = sources(name)
    state, new, manifest = mapped(source, tmp_path, **request_)
    roles = manifest["optimizer_state"]["roles"]
    assert roles[role]["moments"] == "estimate" and "only their sum" in roles[role]["why"]
    old = gradients(source.model, STEP)
    for tensor in plans(source, **request_).values():
        true = new[tensor.output.name]
        if tensor.role != role:
            assert roles[tensor.role]["moments"] == "exact" or tensor.role in ("k", "v")
            if roles[tensor.role]["moments"] == "exact":
                assert deviation(state[tensor.output.name]["exp_avg"], true) < 1e-11
            continue
        dim = tensor.dims[0]
        assert dim is not None
        width = true.shape[1]
        for values in (true, state[tensor.output.name]["exp_avg"]):
            total = torch.zeros(dim.old_width // dim.block, dim.block, width, dtype=torch.float64)
            units = values.view(len(dim.source), dim.block, width)
            total.index_add_(0, torch.from_numpy(dim.source), units)
            assert deviation(total.view(-1, width), old[tensor.output.name]) < 1e-11
        assert deviation(state[tensor.output.name]["exp_avg"], true) > 0.05


def test_noise_heads_below_one_to_one(sources: Any, tmp_path: Path) -> None:
    """A signal head subtracts m copies with lambda / m: the copies are alike, lambda gets m times
    the gradient, through an exponent that moved."""
    source = sources("deep")
    state, new, manifest = mapped(source, tmp_path, noise_heads="x2")
    roles = manifest["optimizer_state"]["roles"]
    for name, true in new.items():
        role = name.rsplit(".", 1)[-1]
        told = roles.get(role) or {}
        kinds = {e["moments"] for e in (told if isinstance(told, list) else [told]) if e}
        # The vectors are written in float32.
        if "estimate" not in kinds:
            assert deviation(state[name]["exp_avg"], true) < 3e-6, name
    assert any("estimate" in str(roles[f"lambda_{v}"]) for v in ("k1", "k2"))
    assert roles["q"]["moments"] == "exact"


def test_layer_that_moves_keeps_its_lambda_gradients(tmp_path: Path) -> None:
    """DiffLlama computes lambda_init from the index; vectors and o_proj take up the change."""
    source = run(tmp_path / "run", tiny.diffllama_config())
    state, new, _ = mapped(source, tmp_path, layers="+1", layer_placement="0")
    exact = [n for n in new if n in state and "lambda_k" not in n]
    assert len(exact) > 20
    for name in exact:
        # The class computes lambda in float32.
        assert deviation(state[name]["exp_avg"], new[name]) < 1e-5, name


@pytest.mark.parametrize("copies", ["x2", "x3"])
@pytest.mark.parametrize("mode", ["split", "noise"])
def test_per_entry_shares_are_estimates_for_producers_alone(
    copies: str, mode: str, sources: Any, tmp_path: Path
) -> None:
    source = sources("gda")
    state, new, manifest = mapped(source, tmp_path, symmetry=mode, ffn=copies)
    roles = manifest["optimizer_state"]["roles"]
    estimates = {role for role, entry in roles.items() if entry["moments"] == "estimate"}
    assert estimates == {"gate", "up"}
    assert all(mode in roles[role]["why"] for role in estimates)
    for name, true in new.items():
        first = state[name]["exp_avg"]
        if "gate" in name or "up_proj" in name:
            assert 0.02 < deviation(first, true) < 1.5
        else:
            tolerance = 1e-11 if mode == "split" else 1e-7
            assert deviation(first, true) < tolerance, name


def test_second_moments_of_a_split_have_the_right_size(tmp_path: Path) -> None:
    """E[s^2] = 1/3, not 1/4: seen in the mean over the rows of a wide model."""
    source = run(tmp_path / "run", tiny.llama_config(intermediate_size=256, hidden_size=64), done=2)
    state, new, _ = mapped(source, tmp_path, ffn="x2", seed=3)
    name = "model.layers.0.mlp.up_proj.weight"
    ratio = float((new[name] ** 2).sum() / state[name]["exp_avg_sq"].sum())
    assert 0.95 < ratio < 1.05
    assert ratio * 4 / 3 > 1.25  # what 1/4 would give


def test_untied_embeddings_share_the_gradient(sources: Any, tmp_path: Path) -> None:
    source = sources("tied")
    state, new, manifest = mapped(source, tmp_path, untie_embeddings=True)
    old = gradients(source.model, STEP)["model.embed_tokens.weight"]
    names = ("model.embed_tokens.weight", "lm_head.weight")
    assert deviation(new[names[0]] + new[names[1]], old) < 1e-11
    assert deviation(sum(state[n]["exp_avg"] for n in names), old) < 1e-11  # type: ignore[arg-type]
    assert manifest["optimizer_state"]["roles"]["embed"]["moments"] == "estimate"


def test_not_preserving_growth_is_all_estimate(sources: Any, tmp_path: Path) -> None:
    source = sources("llama")
    state, _, manifest = mapped(source, tmp_path, layers="x2", depth_method="stack")
    told = manifest["optimizer_state"]
    assert not told["exact"]
    assert all(
        entry["moments"] == "estimate"
        for entries in told["roles"].values()
        for entry in (entries if isinstance(entries, list) else [entries])
    )
    a, b = (state[f"model.layers.{i}.mlp.up_proj.weight"]["exp_avg"] for i in (0, 2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["even", "split"])
def test_more_experts(mode: str, tmp_path: Path) -> None:
    """Copies of an expert are chosen together: each gets 1 / 2 of the gradient (stored in stacks,
    which is how transformers names the parameters of a mixture)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    made = MixtralForCausalLM(config).double()
    made.save_pretrained(tmp_path / "run", save_original_format=False)

    model = load(tmp_path / "run")
    optimizer = torch.optim.AdamW(model.parameters())
    gradients(model, STEP)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "run" / "optimizer.pt")
    source = Run(tmp_path / "run", load(tmp_path / "run"), optimizer)
    state, new, manifest = mapped(source, tmp_path, experts="x2", symmetry=mode)
    roles = manifest["optimizer_state"]["roles"]
    estimates = {role for role, entry in roles.items() if entry["moments"] == "estimate"}
    assert estimates == (set() if mode == "even" else {"fused_router", "gate_up"})
    for name, true in new.items():
        if mode == "even" or not ("mlp.gate.weight" in name or "gate_up_proj" in name):
            # The norms of the class compute in float32.
            assert deviation(state[name]["exp_avg"], true) < 1e-6, name
        else:
            assert deviation(state[name]["exp_avg"], true) > 0.1, name
