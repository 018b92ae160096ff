"""Layer by layer gives the same figures with few weights in memory at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import verify_models as models
from transformers import GPT2Config, GPT2LMHeadModel

from growkit.core.errors import UsageError
from growkit.verification import verify_checkpoints
from growkit.verification.affordable import both_fit
from growkit.verification.layerwise import load_layerwise
from growkit.verification.loading import load_model
from growkit.verification.written_folder import open_folder

IDS = torch.arange(40).reshape(2, 20)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_those_of_the_whole_model(
    tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    model = models.make_model(tie_word_embeddings=tied)
    folder = open_folder(models.save(model, tmp_path / "a", dtype))
    assert ("lm_head.weight" in folder.tensors) is not tied
    whole = load_model(folder, torch.float32)
    lazy = load_layerwise(folder, torch.float32)
    with torch.inference_mode():
        for _ in range(2):  # a second pass reads everything again
            assert torch.equal(lazy(input_ids=IDS).logits, whole(input_ids=IDS).logits)


def test_never_more_than_one_part_is_in_memory(tmp_path: Path) -> None:
    model = models.make_model(num_hidden_layers=12)
    lazy = load_layerwise(open_folder(models.save(model, tmp_path / "a")), torch.float32)
    assert lazy.live_elements == 0
    with torch.inference_mode():
        lazy(input_ids=IDS)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    table = model.lm_head.weight.numel()
    assert lazy.live_elements == 0
    assert lazy.peak_elements == max(layer, table)
    assert lazy.peak_elements < sum(p.numel() for p in model.parameters()) / 10
    assert all(parameter.is_meta for parameter in lazy.model.parameters())


def test_the_whole_comparison_reports_the_same(tmp_path: Path) -> None:
    model = models.make_model()
    a = models.save(model, tmp_path / "a")
    b = models.save(models.grow_heads(model, wrong=True), tmp_path / "b")
    figures: list[dict[str, Any]] = []
    for layerwise in ("off", "on"):
        report = verify_checkpoints(
            a, b, tokens=96, window=32, batch_size=3, generate_tokens=0, layerwise=layerwise
        )
        assert report.layerwise is (layerwise == "on")
        figures.append(report.to_dict())
    different = {key for key in figures[0] if figures[0][key] != figures[1][key]}
    assert different == {"layerwise", "notes"}
    assert figures[0]["first_differing_layer"] == 0


def test_another_architecture_is_refused_with_its_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(tiny).save_pretrained(tmp_path / "a")
    with pytest.raises(UsageError, match="GPT2LMHeadModel of 'a' cannot be run layer by layer"):
        load_layerwise(open_folder(tmp_path / "a"), torch.float32)
    report = verify_checkpoints(
        tmp_path / "a", tmp_path / "a", tokens=32, window=16, generate_tokens=2, all_layers=True
    )
    assert report.passed is True
    assert [entry.layer for entry in report.layers] == [-1, 0, 1]


def test_auto_chooses_by_the_memory_that_both_need(tmp_path: Path) -> None:
    folder = open_folder(models.save(models.make_model(), tmp_path / "a", torch.bfloat16))
    needed = 2 * folder.parameters * 4
    assert both_fit(folder, folder, torch.float32, available=int(needed / 0.6) + 1)
    assert not both_fit(folder, folder, torch.float32, available=int(needed / 0.6) - 1)
    assert both_fit(folder, folder, torch.bfloat16, available=int(needed / 0.6) - 1)
