"""Every finding appears where it applies, and not where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
from family_checkpoints import family_config, write_checkpoint

from growkit.advice import Throughput, advise, facts_of_plan, facts_of_recipe
from growkit.advice.findings import RULES
from growkit.checkpoint import open_checkpoint
from growkit.optimizer_state.store import FOLDER, INDEX
from growkit.surgery.plan import build_plan
from growkit.surgery.request import GrowthRequest
from growkit.training.read_recipe import make_recipe
from growkit.training.recipe import Recipe


def recipe(checkpoint: Path, dtype: str = "float32", **training: Any) -> Recipe:
    values = {"max_steps": 100, "warmup_steps": 10, "learning_rate": 1e-5, **training}
    return make_recipe(
        {
            "model": {"checkpoint": str(checkpoint), "dtype": dtype},
            "data": {"files": "sample", "sequence_length": 8},
            "training": values,
        }
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("llama") / "m", tiny.llama_config())


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma") / "m"
    write_checkpoint(folder, family_config("gemma2"))
    return folder


def names(
    source: Path, growth: dict[str, Any], training: Recipe | None = None, tokens: int | None = None
) -> set[str]:
    request = GrowthRequest(**growth)
    with open_checkpoint(source) as checkpoint:
        plan = build_plan(checkpoint, request.operators(), symmetry=request.symmetry_choice())
        advice = advise(facts_of_plan(plan, training, tokens))
    return {finding.name for finding in advice.findings}


Case = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]
HEADS, FFN, LAYERS = {"query_heads": "x2"}, {"ffn": "x2"}, {"layers": "+1"}
RMS = {"symmetry": "rms"}
CASES: list[Case] = [
    # name, a growth and a recipe where it applies, a growth and a recipe where it does not
    ("identical-copies", FFN | {"symmetry": "even"}, {}, FFN, {}),
    ("identical-copies", FFN | {"symmetry": "even"}, {}, LAYERS | {"symmetry": "even"}, {}),
    ("equal-copies", FFN | RMS, {}, FFN, {}),
    ("equal-copies", FFN | RMS, {}, FFN | RMS, {"new_warmup_steps": 5}),
    ("width-evidence", FFN, {}, LAYERS, {}),
    ("width-evidence", {"hidden": "x2"}, {}, FFN | LAYERS, {}),
    ("head-evidence", HEADS, {}, HEADS | FFN, {}),
    ("loss-jump", LAYERS | {"depth_method": "interpolate"}, {}, LAYERS, {}),
    ("frozen-rate", LAYERS, {"train": "new", "learning_rate": 3e-4}, LAYERS, {"train": "new"}),
    ("frozen-rate", LAYERS, {"train": "new", "learning_rate": 3e-4}, LAYERS, {"learning_rate": 1}),
    ("frozen-width", FFN, {"train": "new"}, LAYERS, {"train": "new"}),
    ("no-warm-up", FFN, {"warmup_steps": 0}, FFN, {"warmup_steps": 0, "new_warmup_steps": 5}),
    ("short-run", FFN, {"max_steps": 69}, FFN, {"max_steps": 70}),
    ("clipping", FFN, {}, FFN, {"max_grad_norm": 0}),
    ("clipping", HEADS, {}, HEADS | {"new_heads": "zero"}, {}),
    ("reader-rate", FFN, {}, FFN | {"new_units": "zero"}, {}),
    ("noise", FFN | {"symmetry": "noise", "noise_snr_db": 20.0}, {}, FFN, {}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_applies_and_does_not(case: Case, llama: Path) -> None:
    name, growth, training, other_growth, other_training = case
    assert name in names(llama, growth, recipe(llama, **training))
    assert name not in names(llama, other_growth, recipe(llama, **other_training))


def test_post_norm_families_are_told(gemma: Path, llama: Path) -> None:
    assert "closed-norm" in names(gemma, LAYERS)
    assert "closed-norm" not in names(llama, LAYERS)
    assert "closed-norm" not in names(gemma, FFN)


def test_over_trained_base(llama: Path) -> None:
    with open_checkpoint(llama) as checkpoint:
        parameters = sum(info.nbytes // 4 for info in checkpoint.tensors.values())
    assert "over-trained" in names(llama, FFN, tokens=21 * parameters)
    assert "over-trained" not in names(llama, FFN, tokens=20 * parameters)
    assert "over-trained" not in names(llama, FFN)


def test_bfloat16_weights(llama: Path, tmp_path: Path) -> None:
    assert "bfloat16-weights" in names(llama, FFN, recipe(llama, "bfloat16"))
    assert "bfloat16-weights" not in names(llama, FFN, recipe(llama, bf16=True))
    stored = tiny.make_folder(tmp_path / "m", tiny.llama_config(), "BF16")
    assert "bfloat16-weights" in names(stored, FFN, recipe(stored, "auto"))
    assert "bfloat16-weights" not in names(stored, FFN, recipe(stored))


def test_grown_optimizer_state_needs_no_warmup(llama: Path, tmp_path: Path) -> None:
    tiny.grow(llama, tmp_path / "grown", ffn="x2")
    run = recipe(tmp_path / "grown", warmup_steps=0)

    def found(run: Recipe) -> set[str]:
        facts = facts_of_recipe(run)
        assert facts is not None
        return {finding.name for finding in advise(facts).findings}

    assert "no-warm-up" in found(run)
    (tmp_path / "grown" / FOLDER).mkdir()
    (tmp_path / "grown" / FOLDER / INDEX).write_text("{}")
    assert "no-warm-up" not in found(run)
    reset = run.model.model_copy(update={"optimizer_state": "reset"})
    assert "no-warm-up" in found(run.model_copy(update={"model": reset}))


def test_every_rule_is_tested_and_sourced() -> None:
    tested = {case[0] for case in CASES} | {"closed-norm", "over-trained", "bfloat16-weights"}
    assert {name for name, _, _ in RULES} == tested
    assert all(source for _, _, source in RULES)


def test_a_plan_and_its_written_folder_get_the_same_advice(llama: Path, tmp_path: Path) -> None:
    plan = tiny.grow(llama, tmp_path / "grown", ffn="x2", layers="+1", symmetry="even")
    run = recipe(tmp_path / "grown", train="new", warmup_steps=0)
    facts = facts_of_recipe(run)
    assert facts is not None
    with open_checkpoint(llama) as checkpoint:
        request = GrowthRequest(ffn="x2", layers="+1", symmetry="even")
        plan = build_plan(checkpoint, request.operators(), symmetry=request.symmetry_choice())
        planned = advise(facts_of_plan(plan, run), Throughput(flops_per_second=1e9))
    assert advise(facts, Throughput(flops_per_second=1e9)).to_dict() == planned.to_dict()
    assert planned.findings


def test_nothing_to_say_about_a_model_from_scratch() -> None:
    run = make_recipe(
        {
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"bytes": True},
            "data": {"files": "sample"},
            "training": {"max_steps": 1},
        }
    )
    assert facts_of_recipe(run) is None
