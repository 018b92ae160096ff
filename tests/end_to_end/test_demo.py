"""The main job, scaled down: train, grow, prove, train on, through the commands a user types."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from growkit.cli.main import main
from growkit.core.errors import UsageError, VerificationFailed
from growkit.training.demo import DemoResult, DemoSettings, flops_per_token, run_demo

TINY = DemoSettings(
    steps=16,
    grown_steps=6,
    decay_steps=3,
    hidden_size=32,
    grown_layers=3,
    sequence_length=32,
    batch_size=4,
    vocab_size=300,
    eval_tokens=1024,
)


@pytest.fixture(scope="module", autouse=True)
def short_sample() -> Any:
    """A tenth of the built-in text: the tokenizer is most of the time otherwise."""
    from growkit.data import sources
    from growkit.samples import sample_text

    text = sample_text()[:100_000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "sample_text", lambda: text)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", TINY)


def test_the_loss_goes_on_without_a_jump(demo: DemoResult) -> None:
    base, grown, scratch = demo.models
    assert demo.verification["passed"] is True
    assert abs(demo.jump) <= 1e-5
    assert grown.loss_at_start == pytest.approx(base.loss_at_end, abs=1e-5)
    assert scratch.loss_at_start > base.loss_at_start - 1, "new weights"
    for model in demo.models:
        assert model.loss_at_end < model.loss_at_start - 0.01
    assert demo.difference == grown.loss_at_end - scratch.loss_at_end


def test_the_model_was_grown_in_depth_and_signal_heads(demo: DemoResult) -> None:
    def config(name: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((demo.out / name / "config.json").read_text())
        return values

    keys = ("num_hidden_layers", "num_attention_heads", "num_noise_heads")
    assert [config("base")[key] for key in keys] == [1, 8, 2]
    for name in ("grown", "grown-trained", "scratch"):
        assert [config(name)[key] for key in keys] == [3, 14, 2], name
    assert config("grown-trained")["growkit"] == config("grown")["growkit"]
    assert "growkit" not in config("scratch"), "it was grown from nothing"
    lineage = [(demo.out / n / "growkit.json").read_bytes() for n in ("grown", "grown-trained")]
    assert lineage[0] == lineage[1]
    first = load_file(demo.out / "grown" / "model.safetensors")
    second = load_file(demo.out / "grown-trained" / "model.safetensors")
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)
    assert second.keys() == load_file(demo.out / "scratch" / "model.safetensors").keys()


def test_both_spend_the_same_and_the_grown_one_reads_on(demo: DemoResult) -> None:
    """FLOPs differ by less than a step; the grown run begins where its source stopped reading."""
    base, grown, scratch = demo.models
    tokens = TINY.batch_size * TINY.sequence_length
    per_step = flops_per_token(demo.out / "scratch", TINY) * tokens
    assert 0 <= grown.flops - scratch.flops < per_step
    assert flops_per_token(demo.out / "grown", TINY) == flops_per_token(demo.out / "scratch", TINY)
    assert base.tokens == TINY.steps * tokens
    assert grown.tokens == (TINY.steps + TINY.grown_steps) * tokens
    places = [model.folder / "data_position.json" for model in (base, grown)]
    read = [json.loads(place.read_text())["sources"]["data"]["read"] for place in places]
    assert read == [steps * TINY.batch_size for steps in (16, 16 + 6)]


def test_what_it_leaves(demo: DemoResult) -> None:
    assert demo.plot is not None
    png = demo.plot.read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 10_000
    figures = json.loads((demo.out / "demo.json").read_text())
    assert figures["jump"] == demo.jump
    assert [m["parameters"] for m in figures["models"]] == [m.parameters for m in demo.models]
    assert not list(demo.out.rglob("*.partial"))


def test_a_second_call_repeats_nothing(demo: DemoResult) -> None:
    weights = {path: path.stat().st_mtime_ns for path in demo.out.rglob("*.safetensors")}
    again = run_demo(demo.out, TINY)
    assert {path: path.stat().st_mtime_ns for path in demo.out.rglob("*.safetensors")} == weights
    assert again.models == demo.models and again.jump == demo.jump


def test_other_settings_and_foreign_folders_are_refused(demo: DemoResult, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="demo with other settings"):
        run_demo(demo.out, DemoSettings(steps=13))
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="holds no demo"):
        run_demo(tmp_path, TINY)


def test_a_jump_is_noticed(demo: DemoResult) -> None:
    """Negative control: one damaged weight of the grown folder, and the demo says so, exit 3."""
    path = demo.out / "grown" / "model.safetensors"
    original = path.read_bytes()
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.o_proj.weight"][:, 0] += 1.0
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    try:
        with pytest.raises(VerificationFailed, match="held-out loss changed by"):
            run_demo(demo.out, TINY)
    finally:
        path.write_bytes(original)


def test_commands(demo: DemoResult, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """grow, then train by the committed recipe, as a user would type them."""
    base, grown, out = (str(p) for p in (demo.out / "base", tmp_path / "grown", tmp_path / "on"))
    assert main(["grow", base, "--signal-heads", "x2", "--out", grown, "-q"]) == 0
    recipe = str(Path(__file__).parents[2] / "recipes" / "train-continue.yaml")
    sets = ["data.sequence_length=32", "data.max_eval_tokens=512", f"model.checkpoint={grown}"]
    command = ["train", recipe, "--out", out, "--max-steps", "4", "--json"]
    command += [part for value in sets for part in ("--set", value)]
    command += ["--set", "training.warmup_steps=1", "--set", "training.save_steps=2"]
    capfd.readouterr()
    assert main(command) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["steps"] == 4
    assert printed.err == ""
    assert main([*command, "--set", "training.learning_rat=1"]) == 2
    message = capfd.readouterr().err
    assert "unknown key 'learning_rat'" in message and "learning_rate" in message
