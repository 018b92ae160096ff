"""What runs do to the saved bytes of old and new slots, and what they report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from grown_runs import changed, continue_recipe, grow, make_source
from training_runs import make, recipe_values

from growkit.core.errors import UsageError
from growkit.record.manifest import read_manifest
from growkit.training import train
from growkit.training.metrics import read_metrics
from growkit.training.read_recipe import make_recipe


@pytest.fixture(scope="module")
def source(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(text_file, tmp_path_factory.mktemp("source") / "base")


@pytest.fixture(scope="module")
def grown(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grow(source, tmp_path_factory.mktemp("grown") / "grown")


def old_and_new(counts: dict[str, tuple[int, int]]) -> tuple[int, int]:
    return sum(old for old, _ in counts.values()), sum(new for _, new in counts.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "muon"},
        {"bf16": True, "max_grad_norm": 0.01},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 3},
        {"optimizer": "muon", "new_learning_rate_multiplier": 2.0, "new_warmup_steps": 3},
    ],
    ids=str,
)
def test_frozen_bytes_are_unchanged(
    options: dict[str, Any], grown: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = continue_recipe(text_file, grown, train="new", weight_decay=0.5, **options)
    result = train(recipe, tmp_path / "run")
    counts = changed(grown, result.out)
    assert old_and_new(counts)[0] == 0
    for name, part in (read_manifest(grown) or {})["new_parameters"].items():
        assert part and counts[name][1] > 0, f"{name} was not trained"
    rows = [row for row in read_metrics(result.metrics) if "loss" in row]
    assert all(row["grad_norm_old"] == 0 and row["grad_norm_new"] > 0 for row in rows)
    assert rows[-1]["grad_norm"] == pytest.approx(rows[-1]["grad_norm_new"], rel=1e-4)


def test_every_growth_can_be_trained_alone(source: Path, text_file: Path, tmp_path: Path) -> None:
    """Rows, columns, both at once, whole layers, an output projection of its own."""
    grow(source, tmp_path / "grown", hidden="x2", signal_heads="x2", ffn="x1.5", layers="+1")
    recipe = continue_recipe(text_file, tmp_path / "grown", train="new")
    counts = changed(tmp_path / "grown", train(recipe, tmp_path / "run").out)
    old, new = old_and_new(counts)
    assert old == 0 and new > 0


def test_all_slots_move_without_freezing(grown: Path, text_file: Path, tmp_path: Path) -> None:
    """Negative control: the same run with train: all changes old bytes in every matrix."""
    recipe = continue_recipe(text_file, grown, train="all", weight_decay=0.5)
    counts = changed(grown, train(recipe, tmp_path / "run").out)
    assert all(old > 0 for name, (old, _) in counts.items() if "proj" in name and ".0." in name)
    assert counts["model.embed_tokens.weight"][0] > 0


@pytest.mark.parametrize("broken", ["decay", "orthogonalisation"])
def test_broken_freezing_is_seen(
    broken: str, source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a mask of gradients alone is not enough. Weight decay moves frozen slots,
    and so does Muon, whose orthogonalised update of rows and columns fills the old corner."""
    from growkit.training.optimizer import GrowthOptimizer, _at, _run

    def gradient_mask_only(
        self: Any, inner: Any, group: Any, name: str, parameter: Any, rates: Any
    ) -> None:
        _run(inner, [_at(group, [parameter], rates.new)])

    monkeypatch.setattr(GrowthOptimizer, "_step_mixed", gradient_mask_only)
    options = {"weight_decay": 0.5} if broken == "decay" else {"optimizer": "muon"}
    recipe = continue_recipe(
        text_file,
        grow(source, tmp_path / "grown", hidden="x2", ffn="x1.5"),
        train="new",
        **{"weight_decay": 0.0, **options},
    )
    out = train(recipe, tmp_path / "run").out
    assert old_and_new(changed(tmp_path / "grown", out))[0] > 0


def test_new_then_all(grown: Path, text_file: Path, tmp_path: Path) -> None:
    """Old bytes stay until the thaw, and every one of them that has a gradient moves after it."""
    recipe = continue_recipe(
        text_file, grown, train={"new_then_all": 3}, save_steps=1, logging_steps=1
    )
    result = train(recipe, tmp_path / "run")
    saved = [
        old_and_new(changed(grown, tmp_path / f"run/training/checkpoints/checkpoint-{step}"))
        for step in range(1, 7)
    ]
    assert [old for old, _ in saved[:3]] == [0, 0, 0] and saved[0][1] > 0
    assert saved[3][0] > 1000
    norms = [row["grad_norm_old"] for row in read_metrics(result.metrics) if "loss" in row]
    assert norms[:3] == [0, 0, 0] and all(norm > 0 for norm in norms[3:])


def test_slower_old_slots_move_less(grown: Path, text_file: Path, tmp_path: Path) -> None:
    """A tenth of the rate is about a tenth of the way under Adam, in new slots the same way."""
    from safetensors.torch import load_file

    start = load_file(grown / "model.safetensors")["model.embed_tokens.weight"]
    ways = []
    for multiplier in (1.0, 0.1):
        recipe = continue_recipe(
            text_file, grown, old_learning_rate_multiplier=multiplier, weight_decay=0.0
        )
        out = train(recipe, tmp_path / str(multiplier)).out
        end = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
        ways.append((end - start).abs().mean().item())
    assert ways[1] == pytest.approx(0.1 * ways[0], rel=0.3)


def test_training_a_trained_folder_knows_what_was_new(
    grown: Path, text_file: Path, tmp_path: Path
) -> None:
    first = train(continue_recipe(text_file, grown, max_steps=3), tmp_path / "first").out
    second = train(continue_recipe(text_file, first, train="new"), tmp_path / "second").out
    assert old_and_new(changed(first, second))[0] == 0


def test_nothing_says_what_is_new(
    source: Path, grown: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"has no growkit\.json, which lists its new"):
        train(continue_recipe(text_file, source, train="new"), tmp_path / "run")
    with pytest.raises(UsageError, match="a model from scratch has no new parameters"):
        train(make(text_file, new_learning_rate_multiplier=2.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    other = tmp_path / "other"
    shutil.copytree(grown, other)
    manifest = json.loads((other / "growkit.json").read_text())
    manifest["new_parameters"]["model.layers.9.mlp.up_proj.weight"] = "all"
    (other / "growkit.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"layers\.9.*no such parameter"):
        train(continue_recipe(text_file, other, train="new"), tmp_path / "run")
    # Where the map only splits the reported norms, a run does not fail for it.
    assert train(continue_recipe(text_file, other, max_steps=2), tmp_path / "all").steps == 2


def test_muon_trains(text_file: Path, tmp_path: Path) -> None:
    """The held-out loss falls, and the matrices' updates are orthogonal: not AdamW by mistake."""
    values = recipe_values(text_file, optimizer="muon")
    out = tmp_path / "run"
    result = train(make_recipe(values), out)
    evaluations = [r["eval_loss"] for r in read_metrics(result.metrics) if "eval_loss" in r]
    assert evaluations[-1] < evaluations[0] - 0.5
    state = torch.load(out / "training/checkpoints/checkpoint-12/optimizer.pt", weights_only=True)
    kinds = {group["kind"]: group["param_names"] for group in state["param_groups"]}
    assert any("q_proj" in name for name in kinds["muon"])
    assert not any("embed" in name or "norm" in name for name in kinds["muon"])
    buffers = [s for s in state["state"].values() if "momentum_buffer" in s]
    assert len(buffers) == len(kinds["muon"])
