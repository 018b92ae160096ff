"""Experts chosen by a hair: rounding decides nothing, a wrong router is still seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
from family_checkpoints import family_config, write_checkpoint

from growkit.verification import VerificationReport, verify_checkpoints
from growkit.verification.routing import Ties

ROUTERS = {
    "mixtral": "model.layers.{}.block_sparse_moe.gate.weight",
    "qwen3_moe": "model.layers.{}.mlp.gate.weight",
}


def tied_routers(path: Path, family: str, **config: Any) -> Path:
    """A checkpoint in which two experts always have equal router logits, in every layer."""
    first = write_checkpoint(path.with_name(path.name + "-plain"), family_config(family, **config))
    tensors = tiny.read_folder(first)
    for layer in range(4):
        router = tensors[ROUTERS[family].format(layer)]
        router[2] = router[1]
    return tiny.write_folder(path, tiny.read_config(first), tensors)


def verified(a: Path, b: Path, **options: Any) -> VerificationReport:
    return verify_checkpoints(a, b, tokens=128, window=32, generate_tokens=0, **options)


@contextlib.contextmanager
def nothing(*arguments: Any, **options: Any) -> Iterator[Ties]:
    yield Ties()


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("family", ROUTERS)
def test_ties_are_decided_as_in_a(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, norm_topk_prob: bool
) -> None:
    more = {"norm_topk_prob": norm_topk_prob} if family == "qwen3_moe" else {}
    source = tied_routers(tmp_path / "a", family, **more)
    # Each copy of a router row is split at random, so the two logits round differently.
    tiny.grow(source, tmp_path / "b", hidden="x2", layers="+2")
    report = verified(source, tmp_path / "b", all_layers=True)
    assert report.passed and report.max_difference < 2e-5, report.cause
    assert all(layer.within for layer in report.layers)
    assert any("ties within rounding" in note for note in report.notes)
    # The negative control: left to rounding, two equal models differ.
    monkeypatch.setattr("growkit.verification.steps.same_choices", nothing)
    left_alone = verified(source, tmp_path / "b")
    assert not left_alone.passed and left_alone.max_difference > 1e-3


def test_copies_of_experts_follow_the_choice_of_their_source(tmp_path: Path) -> None:
    source = tied_routers(tmp_path / "a", "mixtral")
    tiny.grow(source, tmp_path / "b", experts="x2", hidden="x2")
    report = verified(source, tmp_path / "b")
    assert report.passed and report.max_difference < 2e-5, report.cause


@pytest.mark.parametrize("error", [1e-3, 1e-1])
def test_a_router_that_is_wrong_is_not_a_tie(tmp_path: Path, error: float) -> None:
    """Errors far above rounding are never smoothed over, be they a thousandth of a row."""
    source = tied_routers(tmp_path / "a", "mixtral")
    tiny.grow(source, tmp_path / "b", hidden="x2")
    tensors = tiny.read_folder(tmp_path / "b")
    for layer in range(4):
        router = tensors[ROUTERS["mixtral"].format(layer)]
        noise = np.random.default_rng(layer).standard_normal(router.shape)
        router += (error * np.abs(router).mean() * noise).astype(router.dtype)
    wrong = tiny.write_folder(tmp_path / "c", tiny.read_config(tmp_path / "b"), tensors)
    (wrong / "growkit.json").write_text((tmp_path / "b" / "growkit.json").read_text())
    assert not verified(source, wrong).passed


def test_models_without_experts_have_no_choices(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", family_config("llama", num_hidden_layers=2))
    tiny.grow(source, tmp_path / "b", experts="4")
    report = verified(source, tmp_path / "b")
    assert report.passed and not any("ties" in note for note in report.notes)
