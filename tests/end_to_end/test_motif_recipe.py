"""The Motif 2.6B -> 12.7B recipe: the published numbers, and the recipe itself, scaled down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from growkit.cli.main import main
from growkit.modeling import GdaConfig, GdaForCausalLM

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "motif-2.6b-to-12.7b.yaml"
SHAPE = ROOT / "tests" / "data" / "motif-2.6b"


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_plan_gives_the_published_parameter_counts(capsys: pytest.CaptureFixture[str]) -> None:
    report = plan(capsys, str(SHAPE), "--recipe", str(RECIPE))
    assert round(report["before"]["parameters"] / 1e9, 3) == 2.597
    assert round(report["after"]["parameters"] / 1e9, 2) == 12.70
    axes = {axis: sizes["after"] for axis, sizes in report["axes"].items()}
    # Motif-2-12.7B: 40 layers, E 4096, FFN 16384, 32 signal + 8 noise heads, 8 pairs, d 128.
    assert axes == {
        "layer": 40,
        "hidden": 4096,
        "ffn": 16384,
        "signal_head": 32,
        "noise_head": 8,
        "kv_head": 8,
        "head_dim": 128,
        "vocab": 219520,
    }
    assert report["tied_embeddings"] == {"before": True, "after": False}


def small_motif() -> dict:
    """Motif-2.6B's config with every width divided by 16: hidden 128, the same heads and layers."""
    config = json.loads((SHAPE / "config.json").read_text())
    config |= {"hidden_size": 128, "intermediate_size": 512, "head_dim": 8, "vocab_size": 512}
    config |= {"max_position_embeddings": 256, "torch_dtype": "float32"}
    return config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scaled-down model in our format, which transformers loads."""
    folder = tmp_path_factory.mktemp("motif") / "small"
    torch.manual_seed(0)
    model = GdaForCausalLM(GdaConfig.from_motif(small_motif()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.06)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def grown(source: Path) -> Path:
    out = source.with_name("grown")
    assert main(["grow", str(source), "--recipe", str(RECIPE), "--out", str(out), "-q"]) == 0
    return out


def test_the_recipe_scaled_down_is_grown_and_verified(grown: Path) -> None:
    manifest = json.loads((grown / "growkit.json").read_text())
    axes = {axis: sizes["after"] for axis, sizes in manifest["plan"]["axes"].items()}
    assert (axes["layer"], axes["hidden"], axes["ffn"]) == (40, 256, 1024)
    assert (axes["signal_head"], axes["noise_head"], axes["kv_head"]) == (32, 8, 8)
    proof = manifest["verification"]
    assert proof["status"] == "passed"
    assert proof["exactness"] == "exact"
    assert proof["generation"]["equals_a"]


def test_the_grown_model_is_trained_on(grown: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 200)
    recipe = {
        "model": {"checkpoint": str(grown)},
        "tokenizer": {"bytes": True},
        "data": {"files": [str(text)], "sequence_length": 32, "max_eval_tokens": 256},
        "training": {
            "max_steps": 6,
            "learning_rate": 3e-4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
        },
    }
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    assert main(["train", str(file), "--out", str(out), "-q"]) == 0
    lines = [json.loads(line) for line in (out / "training/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert GdaForCausalLM.from_pretrained(out).config.num_hidden_layers == 40
    (checkpoint,) = (out / "training/checkpoints").glob("checkpoint-*")
    for folder in (out, checkpoint):  # a later growth of either knows its ancestors
        assert (folder / "growkit.json").read_bytes() == (grown / "growkit.json").read_bytes()


def test_a_motif_folder_grows_by_the_recipe_and_computes_the_same(
    source: Path, tmp_path: Path
) -> None:
    """transformers has no Motif class: ours reads the folder, here and in the verification."""
    folder = tmp_path / "motif"
    folder.mkdir()
    config = small_motif()
    (folder / "config.json").write_text(json.dumps(config))
    model = GdaForCausalLM.from_pretrained(source)
    stored = load_file(source / "model.safetensors")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "grown"
    arguments = ["grow", str(folder), "--recipe", str(RECIPE), "--out", str(out)]
    assert main([*arguments, "-q"]) == 0

    grown_config = json.loads((out / "config.json").read_text())
    assert grown_config["num_noise_heads"] == 8
    assert grown_config["model_type"] == "Motif"
    larger = GdaForCausalLM(GdaConfig.from_motif(grown_config))
    larger.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    ids = torch.arange(64)[None] * 7 % 512
    with torch.inference_mode():
        before, after = model(ids).logits, larger(ids).logits
    assert torch.allclose(before, after, atol=1e-4 * before.std().item())

    # Negative control: with the lambdas of the source (no move of lambda_init) it is another model.
    state = load_file(out / "model.safetensors")
    for name in list(state):
        if name.endswith("lambda_q2"):
            state[name] = torch.zeros_like(state[name])
    larger.load_state_dict(state, strict=True)
    with torch.inference_mode():
        broken = larger(ids).logits
    assert not torch.allclose(before, broken, atol=1e-2 * before.std().item())
