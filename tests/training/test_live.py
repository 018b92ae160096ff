"""What one sees while a run goes on: live figures, the loss to beat, trackers."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from grown_runs import continue_recipe, grow, make_source
from rich.console import Console
from rich.text import Text
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


def test_the_live_row_fits_80_columns() -> None:
    output = Output()
    screen = io.StringIO()
    output.stderr = Console(file=screen, force_terminal=True, width=80)
    figures = {
        "loss": "3.212 (perplexity 24.8)",
        "learning rate": "1.00e-04",
        "speed": "123,456 tokens/s",
        "router loss": "1.003",
        "held-out": "3.412 (perplexity 30.3)",
        "before growth": "3.100, beaten by 0.112",
    }
    with output.progress("training", 200_000_000_000, unit="tokens") as bar:
        bar.advance(12_345_678)
        bar.figures(figures)
    lines = Text.from_ansi(screen.getvalue()).plain.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80 and "…" not in screen.getvalue()
    for part in (*figures, *figures.values(), "12.35 M/200.0 B tokens"):
        assert any(part in line for line in lines), part


def test_a_batch_job_has_a_log(text_file: Path, tmp_path: Path) -> None:
    """Not a terminal: a line every logging_steps and at each phase; none where it is not wanted."""
    recipe = make(
        text_file, max_steps=4, decay_steps=1, logging_steps=2, eval_steps=4, save_steps=4
    )
    output = Output()
    output.stderr = Console(file=(log := io.StringIO()), width=80, soft_wrap=True)
    train(recipe, tmp_path / "run", reporter=output)
    lines = log.getvalue().splitlines()
    at = [line.split(":")[0] for line in lines if re.match(r"step \d of 4: loss \d", line)]
    assert at == ["step 1 of 4", "step 2 of 4", "step 4 of 4"]
    phases = (
        "tokenizing data", "loading the model", "training: step 0 to 4", "step 0: evaluating",
        "step 0 of 4: held-out loss", "first step done after", "step 4: checkpoint saved",
        "writing the trained model",
    )  # fmt: skip
    found = [next(i for i, line in enumerate(lines) if line.startswith(p)) for p in phases]
    assert found == sorted(found)
    for silent in (Output(quiet=True), Output(json_mode=True)):
        silent.stderr = Console(file=(nothing := io.StringIO()))
        silent.log("step 1")
        with silent.progress("write", 10) as bar:
            bar.advance(5)
        assert nothing.getvalue() == ""


def test_long_work_in_a_batch_job_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output()
    output.stderr = Console(file=(log := io.StringIO()), width=80)
    now = [0.0]
    monkeypatch.setattr("growkit.cli.output.time.monotonic", lambda: now[0])
    with output.progress("write", 4e9) as bar:
        for second in range(1, 26):
            now[0] = float(second)
            bar.advance(1e8)
    assert log.getvalue() == "write: 1 GB of 4 GB\nwrite: 2 GB of 4 GB\n"


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
