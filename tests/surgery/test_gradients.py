"""What training sees of a growth: copies that stay equal, copies that part, heads that wake up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch

from growkit.modeling import GdaForCausalLM

SIZE, GROUPS = 8, 2
CONFIG = tiny.gda_config(4, GROUPS, 1, hidden_size=32, intermediate_size=24, head_dim=SIZE)


def grown_model(tmp_path: Path, config: tiny.Config = CONFIG, **request: Any) -> GdaForCausalLM:
    source = tiny.make_folder(tmp_path / "a", config)
    tiny.grow(source, tmp_path / "b", **request)
    return GdaForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)


def training(model: GdaForCausalLM, steps: int) -> Iterator[int]:
    """AdamW on random text; yields after each backward pass, before the step."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        ids = torch.randint(256, (2, 12), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        yield step
        optimizer.step()


def signal_rows(matrix: torch.Tensor, per_group: int) -> torch.Tensor:
    """q_proj [rows, E] -> [groups, signal heads, head_dim, E]."""
    return matrix.view(GROUPS, per_group + 1, SIZE, -1)[:, :per_group]


def head_columns(matrix: torch.Tensor, per_group: int) -> torch.Tensor:
    """o_proj [E, columns] -> [groups, signal heads, 2 head_dim, E]."""
    return matrix.t().reshape(GROUPS, per_group, 2 * SIZE, -1)


def difference(heads: torch.Tensor) -> float:
    """Largest difference between a head and the copy beside it, relative to the largest entry."""
    first, second = heads[:, 0::2], heads[:, 1::2]
    return float((first - second).abs().max() / heads.abs().max())


def attention(model: GdaForCausalLM, layer: int) -> Any:
    return model.model.layers[layer].self_attn


def test_even_copies_stay_equal(tmp_path: Path) -> None:
    model = grown_model(tmp_path, signal_heads="x2", symmetry="even")
    start = attention(model, 0).q_proj.weight.detach().clone()
    for _ in training(model, 5):
        for layer in range(2):
            module = attention(model, layer)
            assert difference(signal_rows(module.q_proj.weight.grad, 4)) < 1e-5
            assert difference(head_columns(module.o_proj.weight.grad, 4)) < 1e-5
    for layer in range(2):
        module = attention(model, layer)
        # AdamW divides by the gradient's size, so it may enlarge a rounding error a little.
        assert difference(signal_rows(module.q_proj.weight.detach(), 4)) < 1e-2
    assert (attention(model, 0).q_proj.weight - start).abs().max() > 0.03


@pytest.mark.parametrize("mode", ["split", "noise"])
def test_split_copies_part_at_the_first_step(tmp_path: Path, mode: str) -> None:
    model = grown_model(tmp_path, signal_heads="x2", symmetry=mode)
    for layer in range(2):
        assert difference(signal_rows(attention(model, layer).q_proj.weight.detach(), 4)) == 0
    for step in training(model, 5):
        for layer in range(2):
            module = attention(model, layer)
            assert difference(signal_rows(module.q_proj.weight.grad, 4)) > 0.1
            if (
                step == 0
            ):  # the copies' outputs are still equal, and so are their readers' gradients
                assert difference(head_columns(module.o_proj.weight.grad, 4)) < 1e-5
            if step == 4:
                assert difference(head_columns(module.o_proj.weight.grad, 4)) > 1e-3
    for layer in range(2):
        assert difference(signal_rows(attention(model, layer).q_proj.weight.detach(), 4)) > 0.05


def test_ffn_copies_part_too(tmp_path: Path) -> None:
    model = grown_model(tmp_path, ffn="x2")
    for _ in training(model, 1):
        gate = model.model.layers[0].mlp.gate_proj.weight.grad
        assert (gate[:24] - gate[24:]).abs().max() > 0.1 * gate.abs().max()


def test_noise_copies_part_by_themselves(tmp_path: Path) -> None:
    """They serve other signal heads, so even shares do not tie them."""
    model = grown_model(
        tmp_path, tiny.gda_config(4, 1, 1, hidden_size=32, head_dim=SIZE), noise_heads="x2"
    )
    for _ in training(model, 1):
        q = attention(model, 0).q_proj.weight.grad.view(2, 3, SIZE, -1)
        assert (q[0, 2] - q[1, 2]).abs().max() > 0.1 * q[:, 2].abs().max()


def test_new_heads_with_zero_output_wake_up(tmp_path: Path) -> None:
    """Readers get a gradient at the first step, the heads themselves at the second."""
    model = grown_model(tmp_path, signal_heads="+2", new_heads="zero")
    for step in training(model, 2):
        for layer in range(2):
            module = attention(model, layer)
            new_columns = head_columns(module.o_proj.weight.grad, 3)[:, 2]
            new_rows = signal_rows(module.q_proj.weight.grad, 3)[:, 2]
            assert (new_columns != 0).float().mean() > 0.9
            if step == 0:
                assert not new_rows.any()
            else:
                assert (new_rows != 0).float().mean() > 0.9


def test_new_ffn_units_and_identity_layers_wake_up(tmp_path: Path) -> None:
    model = grown_model(tmp_path, ffn="+8", new_units="zero", layers="+1", layer_placement="end")
    for step in training(model, 2):
        mlp = model.model.layers[0].mlp
        assert mlp.down_proj.weight.grad[:, 24:].any()
        inserted = model.model.layers[2]
        assert inserted.self_attn.o_proj.weight.grad.any()
        if step == 1:
            assert mlp.gate_proj.weight.grad[24:].any()
            assert inserted.self_attn.q_proj.weight.grad.any()
            assert inserted.mlp.gate_proj.weight.grad.any()
            assert inserted.self_attn.lambda_q1.grad.any()
