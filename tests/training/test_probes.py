"""Probes measure what they say, and a run with them is the run without."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from grown_runs import continue_recipe, grow, make_source, new_mask
from safetensors.torch import load_file

from growkit.training import train
from growkit.training.growth.copies import find_copies, similarities
from growkit.training.growth.probes import entropies, probe, update_norms
from growkit.training.growth.slots import SlotMap
from growkit.training.growth.trainer_hooks import slots_of
from growkit.training.metrics import read_metrics
from growkit.training.models import build_model


@pytest.fixture(scope="module")
def source(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(text_file, tmp_path_factory.mktemp("source") / "source")


@pytest.fixture(scope="module")
def grown(source: Path) -> Path:
    return grow(source, source.with_name("grown"))


@pytest.fixture(scope="module")
def finished(grown: Path, text_file: Path) -> Path:
    recipe = continue_recipe(text_file, grown, eval_steps=3, save_steps=3)
    return train(recipe, grown.with_name("run")).out


def probes(out: Path) -> dict[int, dict[str, Any]]:
    rows = read_metrics(out / "training" / "metrics.jsonl")
    return {row["step"]: row["probe"] for row in rows if "probe" in row}


def load(folder: Path, text_file: Path) -> tuple[Any, SlotMap]:
    recipe = continue_recipe(text_file, folder)
    model = build_model(recipe.model, range(257), 0)
    return model, slots_of(model, recipe)


BATCH = {"input_ids": torch.arange(2 * 12).view(2, 12)}


def test_a_grown_run_is_probed(finished: Path) -> None:
    found = probes(finished)
    assert sorted(found) == [0, 3, 6]
    start, end = found[0], found[6]
    assert start["head_similarity"] == pytest.approx(1, abs=1e-6)
    assert start["unit_similarity"] == pytest.approx(1, abs=1e-6)
    assert 0 < end["head_similarity"] < 1 - 1e-4 and 0 < end["unit_similarity"] < 1 - 1e-4
    # The inserted layer adds nothing yet: its 6 heads are dead; the 3 copies in the others are not.
    assert start["new_heads"] == 6 + 2 * 3 and start["dead_new_heads"] == 6
    assert end["dead_new_heads"] == 0
    assert len(start["lambda"]) == len(start["signal_entropy"]) == len(start["noise_entropy"]) == 3
    assert "update_norm_new" not in start
    assert end["update_norm_new"] > 0 and end["update_norm_old"] > 0


def test_probes_change_nothing(
    finished: Path, grown: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = continue_recipe(text_file, grown, eval_steps=3, save_steps=3, probe_steps=0)
    plain = train(recipe, tmp_path / "plain").out
    assert probes(plain) == {}
    assert (plain / "model.safetensors").read_bytes() == (
        finished / "model.safetensors"
    ).read_bytes()


def test_dropout_runs_are_not_disturbed(text_file: Path, tmp_path: Path) -> None:
    """No random number is drawn by a probe: with dropout it would show."""
    from training_runs import recipe_values

    from growkit.training.read_recipe import make_recipe

    ends = []
    for every in (0, 2):
        values = recipe_values(text_file, max_steps=5, decay_steps=2, probe_steps=every)
        values["model"]["config"] |= {"attention_dropout": 0.5}
        out = train(make_recipe(values), tmp_path / str(every)).out
        ends.append((out / "model.safetensors").read_bytes())
    assert ends[0] == ends[1] and sorted(probes(tmp_path / "2")) == [0, 2, 4]


def test_resumed_run_logs_the_same_probes(
    finished: Path, grown: Path, text_file: Path, tmp_path: Path
) -> None:
    import shutil

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "training" / "checkpoints" / "checkpoint-6")
    for path in out.iterdir():
        if path.is_file():
            path.unlink()
    train(continue_recipe(text_file, grown, eval_steps=3, save_steps=3), out)
    assert probes(out) == probes(finished)


def test_update_norms_are_of_old_and_new_entries(finished: Path, text_file: Path) -> None:
    """Oracle: one entry at a time from the manifest, on two saved checkpoints."""
    folder = finished / "training" / "checkpoints"
    model, slots = load(folder / "checkpoint-6", text_file)
    before = load_file(folder / "checkpoint-3" / "model.safetensors")
    names = dict(model.named_parameters())
    found = update_norms(model, {name: before[name] for name in names}, slots)
    expected = {"old": 0.0, "new": 0.0}
    for name, parameter in names.items():
        mask = new_mask(name, parameter, folder / "checkpoint-6")
        squares = ((parameter.detach() - before[name]) ** 2).double().numpy()
        expected["new"] += squares[mask].sum()
        expected["old"] += squares[~mask].sum()
    for part, total in expected.items():
        assert found[f"update_norm_{part}"] == pytest.approx(math.sqrt(total), rel=1e-5)


def test_copies_are_found_beside_their_source(grown: Path, text_file: Path) -> None:
    model, slots = load(grown, text_file)
    copies = find_copies(model, slots)
    heads = copies["model.layers.0.self_attn.q_proj.weight"]
    # stripes of 6 signal heads and 1 noise head; every second signal head is a copy
    assert list(zip(heads.new.tolist(), heads.old.tolist(), strict=True)) == [
        (1, 0),
        (3, 2),
        (5, 4),
    ]
    assert similarities(model, copies)["head_similarity"] == pytest.approx(1, abs=1e-6)
    with torch.no_grad():  # a head that is turned round is no longer alike
        model.model.layers[0].self_attn.q_proj.weight[8:16] *= -1
    two_layers = 2 * 3
    expected = (two_layers - 2) / two_layers
    assert similarities(model, copies)["head_similarity"] == pytest.approx(expected, abs=1e-6)


def test_heads_that_add_nothing_are_dead(source: Path, text_file: Path) -> None:
    folder = grow(source, source.with_name("copies"), signal_heads="x2")
    model, slots = load(folder, text_file)
    copies = find_copies(model, slots)
    assert probe(model, BATCH, slots, copies)["dead_new_heads"] == 0
    width = 16  # values of 2 * head_dim; head 1 is the copy of head 0
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, width : 2 * width] *= 1e-6
    found = probe(model, BATCH, slots, copies)
    assert (found["new_heads"], found["dead_new_heads"]) == (6, 1)


def test_lambda_and_entropy_against_their_definition(grown: Path, text_file: Path) -> None:
    model, slots = load(grown, text_file)
    found = probe(model, BATCH, slots, {})
    layers = [layer.self_attn for layer in model.model.layers]
    assert found["lambda"] == pytest.approx([layer.lambda_full().item() for layer in layers])
    # Uniform maps have the entropy log(position), one-hot maps none.
    n = 6
    uniform = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
    maps = torch.stack([*[uniform] * 6, torch.eye(n)])[None]
    measured = entropies(model, (maps,))
    logs = sum(math.log(i) for i in range(1, n + 1)) / n
    assert measured["signal_entropy"] == pytest.approx([logs])
    assert measured["noise_entropy"] == [0]


def test_model_is_left_as_it_was(grown: Path, text_file: Path) -> None:
    model, slots = load(grown, text_file)
    model.train()
    before = model.config._attn_implementation, torch.get_rng_state()
    probe(model, BATCH, slots, find_copies(model, slots))
    assert model.training and model.config._attn_implementation == before[0] == "sdpa"
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not any(module._forward_pre_hooks for module in model.modules())
