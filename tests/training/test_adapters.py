# SPDX-License-Identifier: Apache-2.0
"""LoRA on a grown model: what moves, what is saved, resume, and peft's own loading and merging."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import process_runs as processes
import pytest
import torch
import yaml
from grown_runs import continue_recipe, grow
from safetensors.torch import load_file
from training_runs import figures, recipe_values

from growkit.core.errors import UsageError
from growkit.training import train
from growkit.training.adapters import with_adapters
from growkit.training.read_recipe import make_recipe

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def grown(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a further layer and a wider FFN."""
    folder = tmp_path_factory.mktemp("lora")
    values = recipe_values(text_file, max_steps=3, schedule="constant", warmup_steps=0)
    train(make_recipe(values), folder / "base")
    return grow(folder / "base", folder / "grown", layers="+1", new_layers="identity")


def run(text: Path, grown: Path, out: Path) -> Path:
    settings = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "lora": {"r": 4}}
    return train(continue_recipe(text, grown, **settings), out).out


def test_adapters_train_with_the_new_layer(grown: Path, text_file: Path, tmp_path: Path) -> None:
    out = run(text_file, grown, tmp_path / "run")
    settings = {"max_steps": 4, "eval_steps": 2}
    plain = train(continue_recipe(text_file, grown, **settings), tmp_path / "plain").out
    # An adapter begins as nothing.
    assert figures(out)[0]["eval_loss"] == figures(plain)[0]["eval_loss"]
    assert figures(out)[-1]["eval_loss"] < figures(out)[0]["eval_loss"]
    names = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"model.safetensors", "config.json"} & names
    assert "library_name: peft" in (out / "README.md").read_text()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(grown)
    new = json.loads((grown / "growkit.json").read_text())["new_parameters"]
    saved = load_file(out / "adapter_model.safetensors")
    layer = next(name.split(".")[2] for name in config["modules_to_save"])
    assert all(name.startswith(f"model.layers.{layer}.") for name in config["modules_to_save"])
    assert new and not any(f"layers.{layer}." in name for name in saved if "lora_" in name)

    # Loading and merging are peft's; the folder is the model again.
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)[None]
    with torch.no_grad():
        loaded = AutoPeftModelForCausalLM.from_pretrained(out).eval()
        before = loaded(ids).logits
        merged = loaded.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.allclose(again(ids).logits, before, atol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(grown).eval()
        assert not torch.allclose(base(ids).logits, before, atol=1e-3)
    # Norms, embedding and head of old layers are what they were.
    for name, value in base.state_dict().items():
        if f"layers.{layer}." not in name and value.ndim == 1:
            assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(base.get_input_embeddings().weight, again.get_input_embeddings().weight)


def test_a_resumed_run_is_the_uninterrupted_one(
    grown: Path, text_file: Path, tmp_path: Path
) -> None:
    whole = run(text_file, grown, tmp_path / "whole")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "training" / "checkpoints" / "checkpoint-4")
    for path in cut.iterdir():
        if path.is_file():
            path.unlink()
    run(text_file, grown, cut)
    assert figures(cut) == figures(whole)
    one, other = (load_file(out / "adapter_model.safetensors") for out in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    before = (whole / "adapter_model.safetensors").read_bytes()
    run(text_file, grown, whole)  # finished: nothing is done
    assert (whole / "adapter_model.safetensors").read_bytes() == before


def test_old_slots_of_a_wider_layer_stand_still(
    grown: Path, text_file: Path, tmp_path: Path
) -> None:
    wide = grow(grown.with_name("base"), tmp_path / "wide", ffn="x1.5")
    out = run(text_file, wide, tmp_path / "run")
    saved, base = (
        load_file(out / "adapter_model.safetensors"),
        load_file(wide / "model.safetensors"),
    )
    name = "model.layers.0.mlp.up_proj"
    trained = saved[f"base_model.model.{name}.weight"]
    moved = (trained != base[f"{name}.weight"]).any(dim=1)
    assert 0 < moved.sum() < len(moved)  # 16 of 48 units are new
    assert any("q_proj.lora_A" in key for key in saved)
    assert not any("up_proj.lora_A" in key for key in saved)


def test_adapters_begin_as_the_seed_says(grown: Path, text_file: Path) -> None:
    from transformers import AutoModelForCausalLM

    def begun(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # what ran before
        recipe = continue_recipe(text_file, grown, seed=seed, lora={"r": 4})
        adapted = with_adapters(AutoModelForCausalLM.from_pretrained(grown), recipe)
        return next(value for name, value in adapted.named_parameters() if "lora_A" in name)

    first, again, other = begun(1), begun(1), begun(2)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_two_processes_that_divide_sequences_train_the_adapters_of_one(
    grown: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = {"max_steps": 3, "optimizer": "adamw", "lora": {"r": 4}}
    recipe = continue_recipe(text_file, grown, **settings)
    one = train(recipe, tmp_path / "one").out
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict() | {"parallel": {"context": 2}}))
    processes.run(2, ["train", str(file), "--out", str(tmp_path / "two")])
    saved, other = (load_file(out / "adapter_model.safetensors") for out in (one, tmp_path / "two"))
    assert saved.keys() == other.keys() and any(saved[n].any() for n in saved if "lora_B" in n)
    for name, value in saved.items():
        torch.testing.assert_close(other[name], value, atol=1e-5, rtol=0)


def test_what_is_refused(grown: Path, text_file: Path, tmp_path: Path) -> None:
    for changes, why in (
        ({"train": "new"}, "'train' does not go with 'lora'"),
        ({"optimizer": "muon"}, "'optimizer' does not go with 'lora'"),
    ):
        with pytest.raises(UsageError, match=why):
            continue_recipe(text_file, grown, lora={}, **changes)
    recipe = continue_recipe(text_file, grown, lora={"target_modules": ["q"]})
    with pytest.raises(UsageError, match=r"names 'q', which is no linear layer"):
        train(recipe, tmp_path / "run")
    values = recipe_values(text_file, lora={"r": 2})
    with pytest.raises(UsageError, match=r"needs a 'model\.checkpoint'"):
        make_recipe(values)
