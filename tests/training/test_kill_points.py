"""Killed at every single change of its folder, a command that is repeated makes the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kill_points import Work, sweep
from stage_runs import staged_values
from training_runs import recipe_values

from growkit.cli.main import main


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Once, not in every child."""
    import matplotlib.backends.backend_agg  # noqa: F401

    import growkit.optimizer_state.find
    import growkit.training.growth.stages
    import growkit.training.trainer
    import growkit.verification.comparison  # noqa: F401


def train_command(values: dict[str, Any], place: Path) -> Callable[[Path], Work]:
    """``growkit train`` of a recipe, for an output folder."""
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return lambda out: lambda: main(["train", str(path), "--out", str(out), "--quiet"])


def short(text: Path, tmp_path: Path) -> Callable[[Path], Work]:
    values = recipe_values(text, max_steps=2, warmup_steps=0, decay_steps=1, save_steps=1,
                           logging_steps=1, eval_steps=1, save_total_limit=1)  # fmt: skip
    values["tokenizer"] = {"train_bpe": 260}
    return train_command(values, tmp_path)


def staged(text: Path, tmp_path: Path) -> Callable[[Path], Work]:
    stages = [{"at": {"steps": 2}, "grow": {"ffn": "x2"}}]
    values = staged_values(text, stages, max_steps=3)
    values["training"] |= {"save_steps": 1, "eval_steps": 1, "save_total_limit": 2}
    return train_command(values, tmp_path)


def grown(text: Path, tmp_path: Path) -> Callable[[Path], Work]:
    from grown_runs import make_source

    source = make_source(text, tmp_path / "base")
    return lambda out: (
        lambda: main(
            ["grow", str(source), "--ffn", "x2", "--out", str(out), "--quiet", "--overwrite"]
        )
    )


# The points at which runs went wrong: between a recipe and its name, between the last checkpoint
# of a stage and its record, and in the middle of a publication.
KNOWN = {
    "train": (short, ("recipe.yaml", "/out/growkit_training.json", "/out/config.json")),
    "staged": (staged, ("stages/0/training/final.partial", "stages/0/growkit_training.json")),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_known_points(kind: str, text_file: Path, tmp_path: Path) -> None:
    make, names = KNOWN[kind]
    seen: set[str] = set()

    def first(change: str) -> bool:
        event, _, path = change.partition(" ")
        new = event != "open" and path.endswith(names) and path not in seen
        seen.add(path if new else "")
        return new

    kills, failures = sweep(make(text_file, tmp_path), tmp_path / "sweep", only=first)
    assert kills >= 2
    assert not failures, "\n".join(failures)


@pytest.mark.kill
@pytest.mark.parametrize("make", [short, staged, grown])
def test_every_point(make: Any, text_file: Path, tmp_path: Path) -> None:
    step = int(os.environ.get("GROWKIT_KILL_STEP", "1"))
    kills, failures = sweep(make(text_file, tmp_path), tmp_path / "sweep", step=step)
    print(f"{make.__name__}: {kills} kills, {len(failures)} failures")
    assert not failures, "\n".join(failures)
