"""Attention does not cross documents when asked, and a model that cannot do it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import TINY_GDA, TINY_LLAMA, recipe_values
from variant_checkpoints import SIZES, VARIANTS

from growkit.core.errors import UsageError
from growkit.data.packing import PackedDataset, stream_of
from growkit.training import document_attention, train
from growkit.training.document_attention import NAME, attend_by_document, pieces_of
from growkit.training.document_check import check_separate, leak
from growkit.training.evaluate import evaluate
from growkit.training.read_recipe import make_recipe

# Second document: the same tokens after two different first documents.
FIRST, OTHER, SECOND = [5, 6, 7, 8, 9], [11, 3, 2, 19, 4], [20, 21, 22, 23, 24, 25, 26]


def build(values: dict[str, Any], attention: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    import growkit.modeling  # noqa: F401

    values = {**values, "vocab_size": 64}
    config = CONFIG_MAPPING[values.pop("model_type")](**values)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def packed_item(first: list[int], *, separate: bool) -> dict[str, torch.Tensor]:
    import numpy as np

    tokens = np.array(first + SECOND, np.uint16)
    stream = stream_of(tokens, ends=[len(first), len(tokens)])
    item = PackedDataset([stream], len(tokens), separate=separate)[0]
    return {key: value[None] for key, value in item.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("values", [TINY_LLAMA, TINY_GDA], ids=["llama", "gda"])
def test_documents_do_not_see_each_other(values: dict[str, Any], attention: str) -> None:
    """The joined case is the negative control."""
    model = build(values, attention)
    model.config.use_cache = False
    second, losses, gradients = {}, {}, {}
    for separate in (True, False):
        for first in (FIRST, OTHER):
            batch = packed_item(first, separate=separate)
            output = model(**batch)
            second[separate, first[0]] = output.logits[0, len(FIRST) :]
        losses[separate] = output.loss
        embedding = model.get_input_embeddings().weight
        gradients[separate] = torch.autograd.grad(output.loss, embedding)[0]
    assert torch.equal(second[True, FIRST[0]], second[True, OTHER[0]])
    assert (second[False, FIRST[0]] - second[False, OTHER[0]]).abs().max() > 1e-4
    alone = model(input_ids=torch.tensor([SECOND])).logits[0]
    assert (second[True, FIRST[0]] - alone).abs().max() < 1e-6
    # The loss is that of the documents by themselves, weighed by their predicted tokens.
    parts = [
        (len(ids) - 1) * model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
        for ids in (OTHER, SECOND)
    ]
    assert losses[True].item() == pytest.approx(sum(parts).item() / 10, abs=1e-6)
    assert (gradients[True] - gradients[False]).abs().max() > 1e-4


@pytest.mark.parametrize("values", [TINY_LLAMA, TINY_GDA], ids=["llama", "gda"])
def test_evaluation_of_separate_documents(values: dict[str, Any]) -> None:
    import numpy as np

    model = build(values, "sdpa")
    tokens = np.array(OTHER + SECOND, np.uint16)
    stream = stream_of(tokens, ends=[len(OTHER), len(tokens)])
    found = evaluate(model, PackedDataset([stream], 12, separate=True), batch_size=1)["eval_loss"]
    parts = [
        (len(ids) - 1) * model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
        for ids in (OTHER, SECOND)
    ]
    assert found == pytest.approx(sum(parts) / 10, abs=1e-6)


class IgnoresPositions(torch.nn.Module):
    """A Llama whose class drops position_ids, as one with a mask of its own would."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build(TINY_LLAMA, "sdpa")

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        return self.inner(input_ids, use_cache=False)

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


class TakesNoPositions(IgnoresPositions):
    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:  # type: ignore[override]
        return self.inner(input_ids, use_cache=use_cache)


@pytest.mark.parametrize("values", [TINY_LLAMA, TINY_GDA], ids=["llama", "gda"])
def test_check_passes_models_that_follow_positions(values: dict[str, Any]) -> None:
    for attention in ("sdpa", "eager"):
        model = build(values, attention).train()
        assert leak(model)[0] == 0
        check_separate(model)
        assert model.training


def test_check_refuses_models_that_do_not() -> None:
    with pytest.raises(UsageError, match=r"lets documents .* see each other.*joined"):
        check_separate(IgnoresPositions())
    with pytest.raises(UsageError, match=r"takes no position_ids.*joined"):
        check_separate(TakesNoPositions())


def documents(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [f"the king number {i} spoke " * (i % 3 + 1) for i in range(120)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_run_with_separate_documents(tmp_path: Path) -> None:
    ends = {}
    for attention in ("separate", "joined"):
        values = recipe_values(documents(tmp_path))
        values["data"] |= {"document_attention": attention, "sequence_length": 32}
        ends[attention] = train(make_recipe(values), tmp_path / attention)
    assert ends["separate"].eval_loss != ends["joined"].eval_loss
    assert ends["separate"].eval_loss == pytest.approx(ends["joined"].eval_loss, abs=1.0)


def test_a_run_on_a_model_that_leaks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.create_causal_mask

    def without_positions(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **{**options, "position_ids": None})

    monkeypatch.setattr(modeling_llama, "create_causal_mask", without_positions)
    values = recipe_values(documents(tmp_path))
    values["data"]["document_attention"] = "separate"
    with pytest.raises(UsageError, match="see each other"):
        train(make_recipe(values), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


# A sequence of one document and one of six, of which four share a piece.
LENGTHS = ([320], [20, 90, 40, 7, 150, 13])
MODELS: dict[str, dict[str, Any]] = {
    "llama": TINY_LLAMA,
    "window": TINY_LLAMA | {"model_type": "mistral", "sliding_window": 32},
    "gda own": TINY_GDA,
    "gda shared": TINY_GDA | {"noise_keys": "shared", "num_key_value_heads": 1},
    **{name: SIZES | values for name, values in VARIANTS.items()},
}


def logits_and_gradients(model: Any) -> list[torch.Tensor]:
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    ids = (positions * 5 + torch.arange(positions.shape[1]) // 3) % 61
    output = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False)
    return [output.logits, *torch.autograd.grad(output.loss, list(model.parameters()))]


@pytest.mark.parametrize("name", MODELS)
def test_document_by_document_equals_the_dense_mask(name: str) -> None:
    model = build(MODELS[name] | {"max_position_embeddings": 512}, "sdpa")
    expected = logits_and_gradients(model)
    assert attend_by_document(model)
    assert model.config._attn_implementation == NAME
    for found, wanted in zip(logits_and_gradients(model), expected, strict=True):
        assert (found - wanted).abs().max() <= 2e-5 * max(1, wanted.abs().max())
    assert leak(model)[0] == 0


def test_a_model_whose_logits_would_change_keeps_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 256 tokens without a mask: short documents would see each other."""
    model = build(TINY_LLAMA | {"max_position_embeddings": 512}, "sdpa")
    plain = document_attention.Pieces
    monkeypatch.setattr(
        document_attention, "Pieces", lambda sizes, masks: plain(sizes, [None] * len(masks))
    )
    monkeypatch.setattr(document_attention, "pieces_of", lambda ends: [(0, ends[-1])])
    assert not attend_by_document(model)
    assert model.config._attn_implementation == "sdpa"


def test_pieces_of_documents() -> None:
    assert pieces_of([100, 200, 300, 1000, 1010]) == [
        (0, 200),
        (200, 300),
        (300, 1000),
        (1000, 1010),
    ]
    assert pieces_of([256]) == [(0, 256)]
    assert pieces_of([3, 900]) == [(0, 3), (3, 900)]
