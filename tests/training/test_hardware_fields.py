"""bf16, gradient checkpointing, compilation and attention kernels: from the recipe to the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from process_runs import run
from process_runs import script as run_script
from training_runs import TINY_GDA, make, recipe_values, weights

from growkit.core.errors import UsageError
from growkit.training import train
from growkit.training.read_recipe import make_recipe
from growkit.training.trainer import RunTrainer, training_arguments


def test_fields_reach_transformers(text_file: Path, tmp_path: Path) -> None:
    def arguments(**training: Any) -> Any:
        return training_arguments(make(text_file, **training), tmp_path, evaluation=False)

    plain = arguments()
    assert not plain.bf16 and not plain.torch_compile and plain.dataloader_num_workers == 0
    assert arguments(bf16=True).bf16
    assert arguments(torch_compile=True).torch_compile
    assert arguments(dataloader_num_workers=3).dataloader_num_workers == 3


def observed(
    monkeypatch: pytest.MonkeyPatch, text: Path, out: Path, **training: Any
) -> dict[str, Any]:
    """What a tiny run's model was like in a training step, and the output dtype of its layers."""
    seen: dict[str, Any] = {}
    original = RunTrainer.training_step

    def training_step(self: RunTrainer, model: Any, *given: Any) -> Any:
        seen["checkpointing"] = model.is_gradient_checkpointing
        hook = model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda module, inputs, output: seen.update(dtype=output.dtype)
        )
        try:
            return original(self, model, *given)
        finally:
            hook.remove()

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", training_step)
        values = recipe_values(text, max_steps=3, warmup_steps=0, decay_steps=1, **training)
        values["model"]["config"] = dict(TINY_GDA)
        train(make_recipe(values), out)
    return seen


def test_gradient_checkpointing_changes_memory_only(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = observed(monkeypatch, text_file, tmp_path / "plain")
    kept = observed(monkeypatch, text_file, tmp_path / "kept", gradient_checkpointing=True)
    assert (plain["checkpointing"], kept["checkpointing"]) == (False, True)
    assert weights(tmp_path / "plain") == weights(tmp_path / "kept")


def test_bf16_computes_in_bfloat16_on_float32_weights(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = observed(monkeypatch, text_file, tmp_path / "run", bf16=True)
    assert seen["dtype"] == torch.bfloat16
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("name", ["flash_attention_2", "no_such_kernel"])
def test_attention_that_is_not_there_is_refused(name: str, text_file: Path, tmp_path: Path) -> None:
    values = recipe_values(text_file)
    values["model"]["attn_implementation"] = name
    with pytest.raises(UsageError, match=rf"{name}.*cannot be used.*say sdpa or eager"):
        train(make_recipe(values), tmp_path / "run")


def test_throughput_benchmark_runs_small(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "training_throughput.py"
    figures = tmp_path / "figures.json"
    command = [str(script), "--smoke", "--peak-flops", "1e12", "--json", str(figures)]
    done = run(1, command, run_script)
    llama, gda = json.loads(figures.read_text())
    assert (llama["kind"], gda["kind"]) == ("llama", "gda")
    for row in (llama, gda):
        assert row["tokens_per_second"] > 0 and row["peak_bytes"] > 0
        # 6 N + 12 L H d T
        assert row["flops_per_token"] == 6 * row["parameters"] + 12 * 2 * 32 * 32
        assert row["mfu"] == pytest.approx(
            row["flops_per_token"] * row["tokens_per_second"] / 1e12, abs=1e-4
        )
    assert "| tiny | gda |" in done.output()
