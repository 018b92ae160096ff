"""Probes on tiny modules made by hand: readers, writers, orders and closings are read off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from growkit.derive.axes import Axes, Role
from growkit.derive.widths import WidthProbe

UNITS, HIDDEN = 12, 5
WIDTH = ("width",)


class _Names:
    """Nothing is in a layer."""

    prefixes = ("",)

    def place(self, name: str) -> tuple[str, None, str]:
        return "", None, name

    def role_name(self, name: str) -> tuple[None, str, None]:
        return None, name, None


class _Module:
    """A gated FFN whose gate and up rows stand in one tensor, in an order of its own."""

    def __init__(self, order: np.ndarray, normed: bool = False) -> None:
        self.order, self.normed = order, normed
        self.tensors: dict[str, torch.Tensor] = {}

    def write(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = {
            name: torch.from_numpy(np.array(array)).double().requires_grad_()
            for name, array in tensors.items()
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = x @ self.tensors["gate_up"].T
        rows = torch.empty(len(x), 2 * UNITS, dtype=torch.float64)
        rows[:, torch.from_numpy(self.order)] = both
        gate, up = rows[:, :UNITS], rows[:, UNITS:]
        inside = torch.relu(gate) * up + self.tensors["bias"]
        if self.normed:
            inside = inside * torch.rsqrt(inside.square().mean(-1, keepdim=True) + 1e-6)
        return inside @ self.tensors["down"].T

    def gradients(self, seed: int) -> dict[str, np.ndarray]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(40, HIDDEN, generator=generator, dtype=torch.float64)
        y = self.forward(x)
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum().backward()
        return {name: value.grad.numpy() for name, value in self.tensors.items()}


def probed(module: _Module) -> Any:
    generator = np.random.default_rng(0)
    weights = {
        "gate_up": generator.normal(size=(2 * UNITS, HIDDEN)),
        "bias": generator.normal(size=UNITS),
        "down": generator.normal(size=(HIDDEN, UNITS)),
    }
    roles = [
        Role("gate_up", (2 * UNITS, HIDDEN), sizes=[{(WIDTH,): 2}, {(): HIDDEN}]),
        Role("bias", (UNITS,), sizes=[{(WIDTH,): 1}]),
        Role("down", (HIDDEN, UNITS), sizes=[{(): HIDDEN}, {(WIDTH,): 1}]),
    ]
    axes = Axes(roles, {WIDTH: UNITS}, {}, [], _Names())  # type: ignore[arg-type]
    probe = WidthProbe(module, axes, weights, ["gate_up", "bias", "down"])  # type: ignore[arg-type]
    return probe.find(WIDTH)


def test_the_reader_is_what_is_used_last_and_rows_are_told_apart_in_any_order() -> None:
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(2 * UNITS)
        found = probed(_Module(order))
        assert found.readers == {(2, 1)}
        assert (found.labels[0, 0] == order % UNITS).all()
        assert (found.labels[1, 0] == np.arange(UNITS)).all()
        assert not found.coupled


def test_a_norm_over_the_units_is_seen_and_does_not_hide_their_order() -> None:
    order = np.arange(2 * UNITS)
    found = probed(_Module(order, normed=True))
    assert found.coupled
    known = found.labels[1, 0] >= 0  # the others are left to the proof
    assert known.sum() >= UNITS - 2
    assert (found.labels[1, 0] == np.arange(UNITS))[known].all()
