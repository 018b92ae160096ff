"""Shares of the attention: known of a model that looks at the answer, and of an even map."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from known_models import KnownModel
from tiny_checkpoints import gda_config, llama_config, make_folder

from growkit.evaluation.context_noise import ContextNoise, measure_context_noise
from growkit.evaluation.model import LoadedModel
from growkit.evaluation.needles import FORMS, make_haystacks
from growkit.verification.loading import load_model
from growkit.verification.written_folder import open_folder

DEPTHS = (0.0, 0.5, 1.0)


def measure(loaded: LoadedModel, text: str, form: str, length: int = 160) -> list[ContextNoise]:
    settings = {"form": form, "length": length, "depths": DEPTHS, "samples": 2, "needles": 3}
    haystacks = make_haystacks(loaded, text, **settings, queries=2, seed=0)
    return measure_context_noise(loaded, haystacks, prompts=2)


@pytest.mark.parametrize("form", FORMS)
def test_a_head_that_looks_at_the_answer_is_seen(words, text, form: str) -> None:
    """One head looks at the first token of the answer and nowhere else, the other one evenly."""
    found = measure(KnownModel.loaded(words, "induction"), text, form)
    assert [result.depth for result in found] == [*DEPTHS, None]
    assert [result.prompts for result in found] == [2, 2, 2, 6]
    for result in found:
        effective = result.maps["effective"]
        assert effective.answer_of_best_head == pytest.approx((1.0,))
        expected = [
            (a + b) / 2 for a, b in zip((1, 0, 0, 0, 0), astuple(result.uniform), strict=True)
        ]
        assert astuple(effective.shares) == pytest.approx(expected)
        assert effective.signed_answer == pytest.approx(effective.shares.answer)
        assert effective.answer_by_layer == pytest.approx((effective.shares.answer,))
        assert sum(astuple(result.uniform)) == pytest.approx(1)


@pytest.mark.parametrize("form", FORMS)
def test_a_head_that_looks_beside_the_answer_is_not(words, text, form: str) -> None:
    every = measure(KnownModel.loaded(words, "beside"), text, form)[-1]
    effective = every.maps["effective"]
    assert effective.answer_of_best_head == pytest.approx((every.uniform.answer,), rel=0.2)
    assert effective.shares.needle > 0.5


def even_queries(folder: Path) -> torch.nn.Module:
    """A checkpoint whose queries are zero: every map is even."""
    model = load_model(open_folder(folder), torch.float64)
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.zero_()
    return model


@pytest.mark.parametrize("config", [llama_config(), gda_config()], ids=["llama", "gda"])
def test_an_even_map_has_the_even_shares(words, text, tmp_path: Path, config) -> None:
    """lambda times an even map is even too: the difference changes no share."""
    folder = make_folder(tmp_path / "even", config)
    model = even_queries(folder)
    model.resize_token_embeddings(len(words))
    loaded = LoadedModel(folder, model, words, torch.device("cpu"), "float64")
    every = measure(loaded, text, "copy")[-1]
    assert len(every.maps) == (3 if config["model_type"] == "gda" else 1)
    for maps in every.maps.values():
        assert astuple(maps.shares) == pytest.approx(astuple(every.uniform), rel=1e-6)


def test_signed_figures_tell_cancelled_noise_from_noise(words, text, tmp_path: Path) -> None:
    """Random difference maps: weights of both signs, so |signed| is below the absolute share."""
    folder = make_folder(tmp_path / "gda", gda_config(lambda_init=[1.0, 1.0], sub_layer_norm=False))
    model = load_model(open_folder(folder), torch.float64)
    model.resize_token_embeddings(len(words))
    for name, parameter in model.named_parameters():
        if "lambda_q" in name:
            parameter.zero_()  # lambda is lambda_init = 1: rows of the difference sum to 0
    loaded = LoadedModel(folder, model, words, torch.device("cpu"), "float64")
    every = measure(loaded, text, "copy")[-1]
    difference, signal = every.maps["effective"], every.maps["signal"]
    assert sum(astuple(difference.shares)) == pytest.approx(1)
    assert abs(difference.signed_noise) < 0.5 * difference.shares.noise
    assert signal.signed_noise == pytest.approx(signal.shares.noise)
