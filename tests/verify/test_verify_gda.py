"""Verification of the model that this package brings, differential attention included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import verify_models as models

from growkit.modeling import GdaConfig, GdaForCausalLM
from growkit.verification import verify_checkpoints

SMALL: dict[str, Any] = {"tokens": 128, "window": 32, "generate_tokens": 8}
SIZE, SIGNAL, NOISE = 16, 2, 2


def make_gda(signal: int = SIGNAL, seed: int = 0) -> GdaForCausalLM:
    torch.manual_seed(seed)
    config = GdaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=signal + NOISE,
        num_noise_heads=NOISE,
        num_key_value_heads=4,
        head_dim=SIZE,
        noise_keys="own",
        sub_layer_norm=True,
        lambda_init=[0.3, 0.4, 0.5],
        max_position_embeddings=256,
        initializer_range=0.12,
        tie_word_embeddings=False,
    )
    return GdaForCausalLM(config).eval()


def double_signal_heads(model: GdaForCausalLM, *, wrong: bool = False) -> GdaForCausalLM:
    """Groups of (signal, noise) become (signal, signal, noise); o_proj columns are shared out.

    ``wrong`` copies the signal head of the other group: the negative control.
    """
    grown = make_gda(signal=2 * SIGNAL, seed=1)
    state = dict(model.state_dict())
    rows = [0, 2, 1, 2, 0, 3] if wrong else [0, 0, 1, 2, 2, 3]
    columns = [0, 1, 1, 0] if wrong else [0, 0, 1, 1]
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn."
        q = state[prefix + "q_proj.weight"].view(SIGNAL + NOISE, SIZE, -1)
        o = state[prefix + "o_proj.weight"].view(-1, SIGNAL, 2 * SIZE)
        shares = torch.tensor([0.25, 0.75, 0.25, 0.75])[None, :, None]
        state[prefix + "q_proj.weight"] = q[rows].flatten(0, 1)
        state[prefix + "o_proj.weight"] = (o[:, columns] * shares).flatten(1)
    grown.load_state_dict(state)
    return grown


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(make_gda(), tmp_path_factory.mktemp("gda") / "source")


def test_more_signal_heads_compute_the_same(source: Path, tmp_path: Path) -> None:
    right = models.save(double_signal_heads(make_gda()), tmp_path / "right")
    report = verify_checkpoints(source, right, all_layers=True, **SMALL)
    assert report.passed is True
    assert report.max_difference < report.tolerance / 3
    assert report.first_differing_layer is None
    assert len(report.layers) == 4
    assert report.generation is not None
    assert report.generation.cached_equals_uncached
    assert report.generation.equals_a

    wrong = models.save(double_signal_heads(make_gda(), wrong=True), tmp_path / "wrong")
    report = verify_checkpoints(source, wrong, **SMALL)
    assert report.passed is False
    assert report.max_difference > 1e4 * report.tolerance
    assert report.first_differing_layer == 0


def test_one_lambda_changed_is_found_in_its_layer(source: Path, tmp_path: Path) -> None:
    model = make_gda()
    model.config.lambda_init[2] += 0.01
    report = verify_checkpoints(source, models.save(model, tmp_path / "b"), **SMALL)
    assert report.passed is False
    assert report.first_differing_layer == 2


def test_layer_by_layer_gives_the_same_figures(source: Path, tmp_path: Path) -> None:
    b = models.save(double_signal_heads(make_gda()), tmp_path / "b")
    whole, lazy = (
        verify_checkpoints(
            source, b, tokens=96, window=32, batch_size=3, generate_tokens=0, layerwise=layerwise
        )
        for layerwise in ("off", "on")
    )
    assert lazy.layerwise
    assert lazy.max_difference == whole.max_difference
    assert lazy.perplexity_b == whole.perplexity_b
