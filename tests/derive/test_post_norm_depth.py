"""Depth of models that normalise the residual stream itself (BERT, BART): the last norm of a layer
passes its numbers on to the identity layer behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from growkit import GrowthRequest, plan
from growkit.checkpoint import open_checkpoint
from growkit.diff.folders import diff_checkpoints
from growkit.growing import grow_checkpoint
from growkit.verification.comparison import verify_checkpoints

LAYER = "bert.encoder.layer."
NORM = "output.LayerNorm."


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("post-norm") / "bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    model = BertForMaskedLM(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    model.save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(8, 40)[None]).logits
    return result


def grown(bert: Path, out: Path, **request: object) -> Path:
    asked = GrowthRequest.from_mapping({"layers": "x2", **request})
    grow_checkpoint(bert, out, asked, verify=False)
    return out


@pytest.mark.parametrize("placement", ["even", "end", "1,1"])
def test_deeper_and_the_same_logits(bert: Path, tmp_path: Path, placement: str) -> None:
    out = grown(bert, tmp_path / "grown", layer_placement=placement)
    torch.testing.assert_close(logits(out), logits(bert), atol=2e-5, rtol=0)


def test_the_old_norm_stands_behind_the_new_layer(bert: Path, tmp_path: Path) -> None:
    out = grown(bert, tmp_path / "grown")
    old, new = (load_file(folder / "model.safetensors") for folder in (bert, out))
    for old_layer, passing, last in ((0, 0, 1), (1, 2, 3)):
        assert (new[f"{LAYER}{passing}.{NORM}weight"] == 1).all()
        assert not new[f"{LAYER}{passing}.{NORM}bias"].any()
        for part in ("weight", "bias"):
            wanted = old[f"{LAYER}{old_layer}.{NORM}{part}"]
            np.testing.assert_array_equal(new[f"{LAYER}{last}.{NORM}{part}"], wanted)
    # The control: a norm that keeps its numbers is applied twice.
    for part in ("weight", "bias"):
        new[f"{LAYER}0.{NORM}{part}"] = old[f"{LAYER}0.{NORM}{part}"]
    save_file(new, out / "model.safetensors", metadata={"format": "pt"})
    assert (logits(out) - logits(bert)).abs().max() > 1e-3


def test_it_is_verified_and_explained_layer_by_layer(bert: Path, tmp_path: Path) -> None:
    out = grown(bert, tmp_path / "grown")
    report = verify_checkpoints(bert, out, layerwise="off", all_layers=True)
    assert report.passed, report.cause
    assert [layer.layer for layer in report.layers] == [-1, 1, 3]
    assert all(layer.within for layer in report.layers)
    assert diff_checkpoints(open_checkpoint(bert), open_checkpoint(out))["as_grown"]


def test_an_identity_layer_stands_behind_the_one_that_it_copies(bert: Path) -> None:
    made = plan(bert, GrowthRequest(layers="x2"))
    assert made.exactness.value == "exact"
    asked = GrowthRequest(layers="x2", new_layers="identity", layer_placement="0,0")
    kinds = [layer.kind for layer in plan(bert, asked).growth.stacks["layer"]]
    assert kinds == ["kept", "identity", "identity", "kept"]
