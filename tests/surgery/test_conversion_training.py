"""What training sees of a conversion: new parameters move, copies part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from converted import convert, write_source
from transformers import AutoModelForCausalLM

# Conversion -> new parameters by the step at which they get their first gradient.
FIRST_GRADIENT: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "gda": ({"to": "gda"}, ("lambda_q1",), ("q_proj.weight", "lambda_k1")),
    "diff_v2": ({"to": "diff_v2"}, ("lambda_proj.weight", "q_proj.weight"), ()),
    "gda_gated": ({"to": "gda_gated"}, ("lambda_proj.weight",), ()),
    "shared_diff": ({"to": "shared_diff", "rank": 2}, ("q_up",), ("q_down",)),
    "shared_diff keys": (
        {"to": "shared_diff", "rank": 2, "key_rank": 2},
        ("q_up", "k_up", "o_proj.weight"),
        ("q_down", "k_down"),
    ),
    "wgqa": ({"to": "wgqa"}, ("w_k", "w_v", "k_proj.weight"), ()),
    "sas": (
        {"to": "sas"},
        ("simulate_q.heads.weight", "simulate_v.heads.weight", "simulate_k.features.weight"),
        (),
    ),
}


def steps(model: Any, count: int) -> Any:
    """SGD-like steps of AdamW on random text; yields after each backward pass."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(count):
        ids = torch.randint(256, (2, 12), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        yield step
        optimizer.step()


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def gradients(model: Any, name: str) -> list[torch.Tensor]:
    found = [p.grad for key, p in model.named_parameters() if f"self_attn.{name}" in key]
    assert found, name
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("name", FIRST_GRADIENT)
def test_new_parameters_get_a_gradient_within_two_steps(tmp_path: Path, name: str) -> None:
    request, first, second = FIRST_GRADIENT[name]
    convert(write_source(tmp_path / "a", "gqa"), tmp_path / "b", **request)
    model = loaded(tmp_path / "b")
    for step in steps(model, 2):
        for part in first + (second if step else ()):
            assert all(g.abs().max() > 1e-9 for g in gradients(model, part)), (step, part)


def test_noise_queries_wait_for_lambda(tmp_path: Path) -> None:
    """lambda 0: no gradient into the noise rows at the first step, one at the second."""
    convert(write_source(tmp_path / "a", "gqa"), tmp_path / "b", to="gda", ratio=2)
    model = loaded(tmp_path / "b")
    for step in steps(model, 2):
        for gradient in gradients(model, "q_proj.weight"):
            noise = gradient.view(2, 3, 8, -1)[:, 2]  # stripes of two signal heads and a noise head
            assert (noise.abs().max() > 1e-9) == bool(step)


def parting(tmp_path: Path, parameter: str, view: tuple[int, ...], **request: Any) -> float:
    """Largest difference of two copies after three steps, relative to the start's."""
    convert(write_source(tmp_path / "a", "gqa"), tmp_path / "b", **request)
    model = loaded(tmp_path / "b")
    weight = next(p for n, p in model.named_parameters() if f"self_attn.{parameter}" in n)

    def apart() -> float:
        pair = weight.detach().view(view)
        return float((pair[:, 0] - pair[:, 1]).abs().max())

    before = apart()
    for _ in steps(model, 3):
        pass
    return apart() - before


def test_the_two_maps_of_diff_v2_part(tmp_path: Path) -> None:
    assert parting(tmp_path, "q_proj.weight", (4, 2, 8, 32), to="diff_v2") > 1e-3


def test_mirrored_maps_part(tmp_path: Path) -> None:
    assert parting(tmp_path, "q_proj.weight", (4, 2, 8, 32), to="gda", mirror=0.5) > 1e-3


def simulated_heads_apart(folder: Path) -> float:
    """How far the query taps of the two copies of a head are apart after three steps."""
    model = loaded(folder)
    for _ in steps(model, 3):
        pass
    taps = model.model.layers[0].self_attn.simulate_q.heads.weight.detach()
    first, second = taps.chunk(2)
    return float((first - second).abs().max())


def test_noise_parts_the_simulated_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "a", "gqa")
    convert(source, tmp_path / "b", to="sas")
    assert simulated_heads_apart(tmp_path / "b") > 1e-3
    # The control: without noise the copies get equal gradients and stay equal.
    monkeypatch.setattr("growkit.variants.sas.convert.VALUE_NOISE", 0.0)
    convert(source, tmp_path / "c", to="sas")
    assert simulated_heads_apart(tmp_path / "c") < 1e-6
