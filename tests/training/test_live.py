"""What one sees while a run goes on: live figures, the loss to beat, trackers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from grown_runs import continue_recipe, grow, make_source
from rich.console import Console
from training_runs import make

from growkit.cli.output import Output
from growkit.core.errors import UsageError
from growkit.core.progress import SilentProgress
from growkit.training import Silent, train
from growkit.training.growth.grown import loss_before_growth
from growkit.training.metrics import read_metrics
from growkit.training.trackers import check_trackers


class Watching(Silent):
    """Keeps the figures of the live view."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    @contextmanager
    def progress(
        self, description: str, total: float | None, *, unit: str = "B"
    ) -> Iterator[SilentProgress]:
        seen = self.seen

        class Bar(SilentProgress):
            def figures(self, values: Mapping[str, str]) -> None:
                seen.append(dict(values))

        yield Bar()


@pytest.fixture(scope="module")
def grown(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    return grow(make_source(text_file, folder / "source"), folder / "grown")


def test_live_figures_of_a_grown_run(grown: Path, text_file: Path, tmp_path: Path) -> None:
    watching = Watching()
    result = train(continue_recipe(text_file, grown), tmp_path / "run", reporter=watching)
    first, last = watching.seen[0], watching.seen[-1]
    rows = read_metrics(result.metrics)
    held_out = [row for row in rows if "eval_loss" in row]
    assert first["held-out"].startswith(f"{held_out[0]['eval_loss']:.3f} (perplexity ")
    below = held_out[0]["eval_loss"] - held_out[-1]["eval_loss"]
    assert below > 0
    assert last["before growth"] == f"{held_out[0]['eval_loss']:.3f}, beaten by {below:.3f}"
    losses = [row for row in rows if "loss" in row]
    assert last["loss"].startswith(f"{losses[-1]['loss']:.3f} (perplexity ")
    assert last["learning rate"] == "1.00e-02" and last["speed"].endswith(" tokens/s")
    record = json.loads((result.out / "growkit_training.json").read_text())
    parent = json.loads((grown.with_name("source") / "growkit_training.json").read_text())
    assert record["loss_before_growth"] == parent["eval_loss"]
    assert parent["eval_loss"] == pytest.approx(held_out[0]["eval_loss"], abs=1e-5)


def test_loss_to_beat(grown: Path, text_file: Path) -> None:
    recipe = continue_recipe(text_file, grown)
    rows = [{"step": 0, "eval_loss": 3.5}, {"step": 4, "eval_loss": 3.0}]
    assert loss_before_growth(make(text_file), rows) is None
    # The parent beside it was measured on the same data: it says it itself.
    parent = grown.with_name("source") / "growkit_training.json"
    before = parent.read_text()
    record = json.loads(before)
    assert loss_before_growth(recipe, rows) == record["eval_loss"]
    parent.write_text(json.dumps({**record, "recipe": {"data": {}}}))
    assert loss_before_growth(recipe, rows) == 3.5
    assert loss_before_growth(recipe, rows[1:]) is None
    # Growth that is not exact has no claim on its loss at step 0.
    manifest = json.loads((grown / "growkit.json").read_text())
    manifest["plan"]["exactness"] = "not-exact"
    (grown / "growkit.json").write_text(json.dumps(manifest))
    assert loss_before_growth(recipe, rows) is None
    parent.write_text(before)


def test_figures_are_drawn_below_the_bar() -> None:
    output = Output()
    screen = io.StringIO()
    output.stderr = Console(file=screen, force_terminal=True, width=100)
    with output.progress("training", 100, unit="tokens") as bar:
        bar.advance(40)
        bar.figures({"loss": "3.212 (perplexity 24.8)", "before growth": "3.100, 0.112 to go"})
    shown = screen.getvalue()
    for part in ("40/100", "tokens", "3.212 (perplexity 24.8)", "before growth", "0.112 to go"):
        assert part in shown
    quiet = Output(quiet=True)
    quiet.stderr = Console(file=(silent := io.StringIO()), force_terminal=True)
    with quiet.progress("training", 100) as bar:
        bar.figures({"loss": "1"})
    assert silent.getvalue() == ""


def test_tensorboard_events_read_back(text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make(text_file, max_steps=4, decay_steps=1, report_to=["tensorboard"])
    out = train(recipe, tmp_path / "run").out
    events = EventAccumulator(str(out / "training" / "tensorboard"))
    events.Reload()
    logged: dict[str, Any] = {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }
    rows = read_metrics(out / "training" / "metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    held_out = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert logged["train/loss"] == pytest.approx(losses)
    assert logged["eval/loss"] == pytest.approx(held_out)
    assert not list((out / "training" / "checkpoints").glob("runs"))


def test_unknown_and_missing_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    with pytest.raises(UsageError, match=r"'tensorbord'.*Did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr(
        integration_utils, "get_available_reporting_integrations", lambda: ["wandb"]
    )
    with pytest.raises(UsageError, match=r"not installed.*'growkit\[trackers\]'.*wandb"):
        check_trackers(["tensorboard"])
    check_trackers([])
