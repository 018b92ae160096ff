"""``from growkit import ...``: what a notebook and a plain loop use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import growkit
from growkit import GrowthRequest, convert, grow, load_grown_optimizer, plan, verify
from growkit.core.errors import UsageError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the optimizer state of a few steps beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model, folder = LlamaForCausalLM(config), tmp_path_factory.mktemp("run")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder


def test_importing_it_imports_no_torch() -> None:
    code = (
        "import sys; from growkit import grow, plan, GrowthRequest; print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_every_name_of_the_interface_is_there() -> None:
    assert all(hasattr(growkit, name) for name in growkit.__all__)
    with pytest.raises(AttributeError, match="grow_it"):
        growkit.grow_it  # noqa: B018


def test_a_plan_takes_strings_numbers_and_a_folder_without_weights(run: Path) -> None:
    by_number, by_text = plan(str(run), layers=4), plan(run, layers="x2")
    assert by_number.growth.sizes["layer"] == by_text.growth.sizes["layer"] == 4
    request = GrowthRequest(layers="+2")
    assert plan(run, request).growth.sizes == by_number.growth.sizes
    motif = Path(__file__).parent / "data" / "motif-2.6b"
    assert plan(motif, layers="+8").growth.sizes["layer"] == 40


def test_a_request_and_keywords_are_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="Give one of them"):
        plan(run, GrowthRequest(layers="+2"), ffn="x2")


def test_grow_then_train_on_with_the_grown_optimizer(run: Path, tmp_path: Path) -> None:
    grown = grow(str(run), str(tmp_path / "grown"), ffn="x2", layers=3)
    assert grown.manifest["verification"]["passed"] is True
    assert verify(str(run), grown.folder).passed
    model = AutoModelForCausalLM.from_pretrained(grown.folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    result = load_grown_optimizer(optimizer, model, grown.folder)
    assert result.loaded and not result.unused
    old = torch.load(run / "optimizer.pt", weights_only=True)["state"][0]["exp_avg"]
    new = optimizer.state[model.model.embed_tokens.weight]["exp_avg"]
    torch.testing.assert_close(new, old)
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def test_no_grown_state_is_said(run: Path) -> None:
    with pytest.raises(UsageError, match="no grown optimizer state"):
        load_grown_optimizer(None, None, run)


def test_convert(run: Path, tmp_path: Path) -> None:
    made = convert(run, tmp_path / "gda", "gda", ratio=1)
    assert made.manifest["verification"]["passed"] is True
