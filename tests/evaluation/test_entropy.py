"""Entropy of even maps is log of what is seen, of pointed ones 0; figures against a loop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import gda_config, llama_config, make_folder

from growkit.evaluation.attention_maps import AttentionEntropy, measure_entropy, row_entropy
from growkit.evaluation.model import LoadedModel
from growkit.verification.loading import load_model
from growkit.verification.written_folder import open_folder

WINDOWS = torch.arange(4 * 12).view(4, 12)
MEAN_LOG = sum(math.log(seen) for seen in range(2, 13)) / 11


def measured(path: Path, config: dict, queries: float = 1.0) -> AttentionEntropy:
    if not path.exists():
        make_folder(path, config)
    model = load_model(open_folder(path), torch.float64)
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter *= queries
    loaded = LoadedModel(path, model, None, torch.device("cpu"), "float64")
    return measure_entropy(loaded, WINDOWS)


@pytest.mark.parametrize("config", [llama_config(), gda_config()], ids=["llama", "gda"])
def test_even_attention_has_all_the_entropy_there_is(tmp_path: Path, config) -> None:
    found = measured(tmp_path / "even", config, queries=0.0)
    for layer in found.layers:
        for entropy in layer.values():
            assert entropy.normalised == pytest.approx(1, abs=1e-12)
            assert entropy.nats == pytest.approx(MEAN_LOG)
    assert found.mean["effective"].nats == pytest.approx(MEAN_LOG)
    assert (found.tokens, found.window) == (48, 12)


def test_pointed_attention_has_none(tmp_path: Path) -> None:
    found = measured(tmp_path / "pointed", llama_config(), queries=1e6)
    assert found.mean["effective"].normalised < 0.02
    usual = measured(tmp_path / "pointed", llama_config())
    assert 0.02 < usual.mean["effective"].normalised < 1 - 1e-4


def test_figures_are_those_of_the_models_maps(tmp_path: Path) -> None:
    """Oracle: one head, one row at a time, on the maps that transformers returns."""
    path = make_folder(tmp_path / "gda", gda_config())
    found = measured(path, {})
    model = load_model(open_folder(path), torch.float64)
    model.set_attn_implementation("eager")
    maps = model(input_ids=WINDOWS, output_attentions=True).attentions[1]
    expected: dict[str, list[float]] = {"signal": [], "noise": []}
    for window in range(4):
        for head in range(6):  # stripes of 2 signal heads and 1 noise head
            kind = "noise" if head % 3 == 2 else "signal"
            for row in range(1, 12):
                weights = maps[window, head, row, : row + 1].tolist()
                expected[kind].append(-sum(w * math.log(w) for w in weights) / math.log(row + 1))
    for kind, values in expected.items():
        assert found.layers[1][kind].normalised == pytest.approx(sum(values) / len(values))


def test_rows_are_read_as_distributions_of_absolute_weights() -> None:
    rows = torch.tensor([[0.5, -0.5, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert row_entropy(rows).tolist() == pytest.approx([math.log(2), 0, 0, math.log(3)])
