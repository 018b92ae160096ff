"""Growing and then shrinking gives the source back, for random configs and combinations."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shrink import shrink

from growkit.checkpoint import open_checkpoint
from growkit.surgery.plan import build_plan
from growkit.surgery.request import GrowthRequest


@st.composite
def differential_heads(draw: st.DrawFn) -> tuple[int, int, int]:
    """(signal, noise, kv pairs) that fit together."""
    kv = draw(st.sampled_from([1, 2]))
    base = kv * draw(st.integers(1, 2))
    ratio = draw(st.integers(1, 3))
    return (base * ratio, base, kv) if draw(st.booleans()) else (base, base * ratio, kv)


@st.composite
def sources(draw: st.DrawFn) -> tiny.Config:
    common = {
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    family = draw(st.sampled_from(["gda", "gda", "motif", "diffllama", "llama"]))
    if family == "llama":
        kv = draw(st.sampled_from([1, 2]))
        biases = {k: draw(st.booleans()) for k in ("attention_bias", "mlp_bias")}
        return tiny.llama_config(4, kv, **common, **biases)
    signal, noise, kv = draw(differential_heads())
    if family == "diffllama":
        return tiny.diffllama_config(2 * signal, 2 * kv if not signal % kv else 2, **common)
    if family == "motif":
        if signal < noise:
            signal, noise = noise, signal
        return tiny.motif_config(signal, noise, kv, **common)
    more: dict[str, Any] = {
        "sub_layer_norm": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["silu", "poly_norm"])),
    }
    return tiny.gda_config(signal, noise, kv, draw(st.booleans()), **common, **more)


@st.composite
def requests(draw: st.DrawFn, config: tiny.Config) -> dict[str, Any]:
    """A random combination of operators that this model allows."""
    request: dict[str, Any] = {}
    heads = config["num_attention_heads"]
    noise = config.get("num_noise_heads", heads // 2)
    if config["model_type"] != "llama":
        if draw(st.booleans()):
            request["uniform_heads"] = "x2"
        if heads - noise >= noise and draw(st.booleans()):
            request["signal_heads"] = draw(st.sampled_from(["x2", "x3"]))
            request["new_heads"] = draw(st.sampled_from(["copy", "zero"]))
        if request.get("new_heads") != "zero" and draw(st.booleans()):
            factor = 2 if "signal_heads" in request and request["signal_heads"] == "x2" else 1
            request["noise_heads"] = f"x{factor}"
    if draw(st.booleans()):
        whole = config["hidden_act"] == "poly_norm"
        request["ffn"] = draw(st.sampled_from(["x2", "x3"] if whole else ["x2", "+1", "+7", "30"]))
        request["new_units"] = "copy" if whole else draw(st.sampled_from(["copy", "zero"]))
    if draw(st.booleans()):
        request["hidden"] = "x2"
    if config["tie_word_embeddings"] and draw(st.booleans()):
        request["untie_embeddings"] = True
    if not request or draw(st.booleans()):
        request["layers"] = f"+{draw(st.integers(1, 4))}"
    return request


def moved(name: str) -> bool:
    """Carries a lambda or a factor that is no power of two: checked in test_lambdas."""
    return "lambda_" in name or "subln" in name


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(st.data())
def test_grow_then_shrink_returns_the_source(data: st.DataObject) -> None:
    config = data.draw(sources())
    request = data.draw(requests(config))
    dtype = data.draw(st.sampled_from(["BF16", "F16", "F32"]))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "a"
        tensors = tiny.make_tensors(config, dtype, seed=data.draw(st.integers(0, 3)))
        tiny.write_folder(source, config, tensors)
        plan = tiny.grow(source, Path(folder) / "b", **request)
        grown = tiny.read_folder(Path(folder) / "b")
    assert {n: a.shape for n, a in grown.items()} == tiny.shapes(_shape_config(plan.config, grown))
    rescaled = {t.source for t in plan.tensors if t.factor != 1.0 and t.role != "final_norm"}
    rescaled |= {t.source for t in plan.tensors if t.lambda_change is not None}
    back = shrink(plan, grown)
    assert back.keys() == tensors.keys()
    for name, old in tensors.items():
        if name in rescaled:
            assert moved(name) or config["model_type"] == "diffllama"
        else:
            assert tiny.same_bits(np.abs(back[name]), np.abs(old)), name  # -0 may return as 0
            assert (back[name] == old).all(), name


def _shape_config(config: tiny.Config, grown: tiny.Tensors) -> tiny.Config:
    return {**config, "sub_layer_norm": config.get("sub_layer_norm", True)}


def test_shrinking_sees_a_lost_share(tmp_path: Path) -> None:
    """The negative control: one share that is not what was taken off the others."""
    config = tiny.gda_config()
    tensors = tiny.make_tensors(config, "BF16")
    tiny.write_folder(tmp_path / "a", config, tensors)
    plan = tiny.grow(tmp_path / "a", tmp_path / "b", signal_heads="x2")
    grown = tiny.read_folder(tmp_path / "b")
    name = "model.layers.0.self_attn.o_proj.weight"
    grown[name][0, 0] = 0
    assert (shrink(plan, grown)[name] != tensors[name]).sum() == 1


@pytest.mark.parametrize("family", ["gda", "motif", "diffllama", "llama"])
def test_a_depth_plan_copies_every_old_tensor_byte_for_byte(tmp_path: Path, family: str) -> None:
    """Blocks at the end move no old layer, so nothing old is touched in any family."""
    config = getattr(tiny, f"{family}_config")()
    source = tiny.make_folder(tmp_path / "a", config, "BF16")
    with open_checkpoint(source) as checkpoint:
        request = GrowthRequest(layers="+1", layer_placement="end")
        plan = build_plan(checkpoint, request.operators())
    kept = [t for t in plan.tensors if t.layer is None or t.layer < 2]
    assert {t.action for t in kept} == {"copied"}
    assert {t.action for t in plan.tensors if t.role in ("o", "down") and t.layer == 2} == {"zero"}
