"""A model that amplifies rounding is no false alarm, and a small fault still is one."""

from __future__ import annotations

import sys
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
import verify_models as models
from transformers import MistralForCausalLM

from growkit.verification import VerificationReport, verify_checkpoints

VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def amplifying(path: Path, dtype: str, queries: float) -> Path:
    """lambda = 0.97 and nearly even attention: the norm divides the small difference of two
    nearly equal maps."""
    config = tiny.gda_config(lambda_init=[0.2, 0.2], hidden_size=32)
    folder = tiny.make_folder(path, config, dtype)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            if "q_proj" in name or "k_proj" in name:
                tensors[name] = (value.float() * queries).to(value.dtype)
            elif any(vector in name for vector in VECTORS):
                tensors[name] = torch.zeros_like(value)
                if "1" in name.rsplit(".", 1)[-1]:
                    tensors[name][0] = 0.571**0.5  # exp(0.571) - 1 + 0.2 = 0.97

    models.edit(folder, change)
    return folder


def compare(a: Path, b: Path) -> VerificationReport:
    return verify_checkpoints(a, b, tokens=256, generate_tokens=0)


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_amplified_rounding_passes_and_a_fault_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    a = amplifying(tmp_path / "a", dtype, 0.05)
    request = {"hidden": "x3", "symmetry": "even"} if dtype == "F16" else {"hidden": "x2"}
    tiny.grow(a, b := tmp_path / "b", **request)
    right = compare(a, b)
    assert right.passed is True, right.cause
    # The same at a fortieth of the rule, which this model's rounding exceeds.
    rule = sys.modules["growkit.verification.tolerance"]  # the package has a function of that name
    for name in ("COMPUTE_FACTOR", "STORAGE_FACTOR"):
        monkeypatch.setattr(rule, name, getattr(rule, name) / 40)
    widened = compare(a, b)
    assert widened.amplification > 1
    assert widened.passed is True, widened.cause

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.self_attn.o_proj.weight"
        tensors[name][:, :8] *= 1 + 2.0**-8 if dtype == "F32" else 2

    models.edit(b, nudge)
    wrong = compare(a, b)
    assert wrong.passed is False


def test_an_ordinary_model_is_held_to_the_rule(tmp_path: Path) -> None:
    """The tolerance is widened only where A's own rounding asks for it, never by B's error."""
    model = models.make_model()
    a = models.save(model, tmp_path / "a")
    model.model.layers[1].self_attn.o_proj.weight.data[:, :16] *= 1 + 2**-8
    report = compare(a, models.save(model, tmp_path / "b"))
    assert report.passed is False
    assert report.amplification < 1.5
    assert report.max_difference > 20 * report.tolerance


def test_a_class_that_does_not_compute_in_float64_is_held_to_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLNet adds float32 masks to its products."""
    model = models.make_model()
    a = models.save(model, tmp_path / "a")
    model.model.layers[1].self_attn.o_proj.weight.data[:, :16] *= 1 + 2**-8
    forward = MistralForCausalLM.forward

    @wraps(forward)
    def in_float32(self: Any, *args: Any, **named: Any) -> Any:
        if self.dtype == torch.float64:
            raise RuntimeError("expected scalar type Float but found Double")
        return forward(self, *args, **named)

    monkeypatch.setattr(MistralForCausalLM, "forward", in_float32)
    report = compare(a, models.save(model, tmp_path / "b"))
    assert report.passed is False and report.amplification == 1
    assert any("MistralForCausalLM does not compute in float64" in note for note in report.notes)
