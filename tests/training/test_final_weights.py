"""What the weights are that a run leaves: their dtype, lambda in float32, means of checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from grown_runs import changed, continue_recipe, grow, make_source
from safetensors.torch import load_file, save_file
from training_runs import make

from growkit.core.errors import CheckpointError, UsageError
from growkit.training import train
from growkit.training.averaging import average_into, last_whole
from growkit.training.final_dtype import store_in
from growkit.training.metrics import read_metrics


@pytest.fixture(scope="module")
def bf16(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint, grown; lambda is float32, as our model class saves it."""
    source = tmp_path_factory.mktemp("source") / "base"
    make_source(text_file, source, torch.bfloat16)
    return grow(source, tmp_path_factory.mktemp("grown") / "grown", hidden="x2", signal_heads="x2")


def dtypes(folder: Path) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}


def is_lambda(name: str) -> bool:
    return "lambda" in name


@pytest.mark.parametrize(
    ("model_dtype", "optimizer"),
    [("float32", "adamw"), ("bfloat16", "adamw"), ("bfloat16", "muon")],
)
def test_frozen_bytes_of_a_bfloat16_source(
    model_dtype: str, optimizer: str, bf16: Path, text_file: Path, tmp_path: Path
) -> None:
    """float32 and back is the identity on what was bfloat16, and so is a mean of equal values."""
    recipe = continue_recipe(
        text_file,
        bf16,
        train="new",
        optimizer=optimizer,
        weight_decay=0.5,
        save_steps=2,
        average_checkpoints=3,
    )
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"dtype": model_dtype})}
    )
    out = train(recipe, tmp_path / "run").out
    counts = changed(bf16, out)  # the same dtypes, too
    assert sum(old for old, _ in counts.values()) == 0
    assert sum(new for _, new in counts.values()) > 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    saved = dtypes(tmp_path / "run/training/checkpoints/checkpoint-6")
    expected = getattr(torch, model_dtype)
    assert all(d == (torch.float32 if is_lambda(n) else expected) for n, d in saved.items())


def test_saved_dtype_is_the_sources(bf16: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = train(continue_recipe(text_file, bf16), tmp_path / "run").out
    final = load_file(out / "model.safetensors")
    last = load_file(out / "training/checkpoints/checkpoint-6/model.safetensors")
    for name, tensor in final.items():
        expected = torch.float32 if is_lambda(name) else torch.bfloat16
        assert torch.equal(tensor, last[name].to(expected)), name  # nearest even, as torch
        assert last[name].dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.layers[0].self_attn.lambda_q1.dtype == torch.float32


@pytest.mark.parametrize("asked", ["float32", "float16"])
def test_asked_for_dtype(asked: str, bf16: Path, text_file: Path, tmp_path: Path) -> None:
    out = train(continue_recipe(text_file, bf16, save_dtype=asked), tmp_path / "run").out
    kinds = dtypes(out)
    assert {kind for name, kind in kinds.items() if not is_lambda(name)} == {getattr(torch, asked)}
    assert {kind for name, kind in kinds.items() if is_lambda(name)} == {torch.float32}
    assert json.loads((out / "config.json").read_text())["dtype"] == asked


def test_lambda_follows_a_source_that_holds_it(tmp_path: Path) -> None:
    """bfloat16 lambda vectors that training left alone come back as bfloat16; moved ones do not."""
    written, source = tmp_path / "written", tmp_path / "source"
    values = torch.tensor([1.0, 0.5])
    for folder, tensors in (
        (source, {"a.lambda_q1": values.bfloat16(), "a.lambda_k1": values.bfloat16(),
                  "w": torch.ones(3, 3, dtype=torch.bfloat16)}),
        (written, {"a.lambda_q1": values, "a.lambda_k1": values + 1e-3, "w": torch.ones(3, 3)}),
    ):  # fmt: skip
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "llama"}')
    store_in(written, "source", source)
    assert dtypes(written) == {
        "a.lambda_q1": torch.bfloat16,
        "a.lambda_k1": torch.float32,
        "w": torch.bfloat16,
    }
    assert sorted(path.name for path in written.iterdir()) == ["config.json", "model.safetensors"]


def test_values_that_float16_cannot_hold_stay(tmp_path: Path) -> None:
    tensors = {"large": torch.tensor([1.0, 7e4]), "inf": torch.tensor([torch.inf, 1.0])}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    store_in(tmp_path, "float16", None)
    assert dtypes(tmp_path) == {"large": torch.float32, "inf": torch.float16}


def test_lambda_of_other_families_keeps_the_stored_float32(tmp_path: Path) -> None:
    """transformers would round DiffLlama's lambda vectors to bfloat16 when it loads them."""
    from transformers import AutoModelForCausalLM, DiffLlamaConfig

    from growkit.training.models import build_model
    from growkit.training.recipe import ModelSection

    config = DiffLlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.lambda_q1"]
    section = ModelSection(checkpoint=tmp_path, dtype="bfloat16")
    model = build_model(section, range(32), 0)
    attention = model.model.layers[0].self_attn
    assert torch.equal(attention.lambda_q1, stored)
    assert not torch.equal(stored.bfloat16().float(), stored)  # the test could fail
    assert attention.q_proj.weight.dtype == torch.bfloat16
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert attention.lambda_q1.grad.dtype == torch.float32


def test_lambda_has_its_own_rate(bf16: Path, text_file: Path, tmp_path: Path) -> None:
    """Of one step of Adam, which moves every entry by its rate, whatever its gradient."""
    start = load_file(bf16 / "model.safetensors")
    ways: dict[float, dict[str, float]] = {}
    for multiplier in (1.0, 0.1):
        recipe = continue_recipe(
            text_file, bf16, max_steps=1, lambda_learning_rate_multiplier=multiplier
        )
        out = train(recipe, tmp_path / str(multiplier)).out
        end = load_file(out / "model.safetensors")
        ways[multiplier] = {
            name: (end[name].float() - start[name].float()).abs().mean().item() for name in start
        }
    lambdas = [name for name in start if is_lambda(name)]
    assert lambdas
    for name in lambdas:
        assert ways[0.1][name] == pytest.approx(0.1 * ways[1.0][name], rel=0.02)
    other = "model.layers.0.mlp.up_proj.weight"
    assert ways[0.1][other] == pytest.approx(ways[1.0][other])


def test_mean_of_the_last_checkpoints(text_file: Path, tmp_path: Path) -> None:
    recipe = make(text_file, average_checkpoints=3, save_total_limit=1)
    result = train(recipe, tmp_path / "run")
    folder = tmp_path / "run/training/checkpoints"
    assert len(list(folder.glob("checkpoint-*"))) == 3  # what is averaged is kept
    saved = [load_file(folder / f"checkpoint-{n}/model.safetensors") for n in (6, 9, 12)]
    final = load_file(result.out / "model.safetensors")
    for name, tensor in final.items():
        mean = torch.stack([state[name].double() for state in saved]).mean(0)
        torch.testing.assert_close(tensor, mean.float(), rtol=1e-7, atol=1e-9)
        assert not torch.equal(tensor, saved[-1][name]), name
    rows = [row for row in read_metrics(result.metrics) if "eval_loss" in row]
    assert rows[-1]["averaged_checkpoints"] == 3 and rows[-1]["step"] == rows[-2]["step"] == 12
    assert result.eval_loss == rows[-1]["eval_loss"] != rows[-2]["eval_loss"]
    again = tmp_path / "again"
    shutil.copytree(result.out, again)
    (again / "growkit_training.json").unlink()
    assert train(recipe, again).eval_loss == result.eval_loss
    assert [r for r in read_metrics(again / "training/metrics.jsonl") if "eval_loss" in r] == rows


def test_mean_of_equal_values_is_that_value(tmp_path: Path) -> None:
    """Also for three checkpoints and subnormals; float32 sums divided by 3 would round."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 3000, dtype=np.uint32).view(np.float32)
    values = torch.from_numpy(bits[np.isfinite(bits)].copy())
    for n in range(3):
        (tmp_path / str(n)).mkdir()
        save_file({"w": values}, tmp_path / str(n) / "model.safetensors")
        (tmp_path / str(n) / "config.json").write_text("{}")
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros_like(values))
    average_into(model, [tmp_path / str(n) for n in range(3)])
    assert torch.equal(model.w.detach(), values)
    assert not torch.equal((values + values + values) / 3, values)  # negative control


def test_too_few_checkpoints(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"average_checkpoints is 5, and the run saves 4"):
        make(text_file, average_checkpoints=5)
    with pytest.raises(CheckpointError, match="0 whole checkpoints"):
        last_whole(tmp_path, 2)
