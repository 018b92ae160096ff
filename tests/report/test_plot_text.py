"""Names in figures are names: no formula, and no figure stops a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from growkit.report.canvas import Figure, canvas, finished
from growkit.training import metrics

NAME = "cost_$5_or_$6 \\frac{ $\\bad{$ \x1b[2J <b>"
ROWS = [{"tokens": 10, "loss": 2.0, "eval_loss": 2.0}, {"tokens": 20, "loss": 1.0}]


class Heard:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


def test_a_dollar_is_a_dollar(tmp_path: Path) -> None:
    heard, file = Heard(), tmp_path / "loss.png"
    curves: list[metrics.Curve] = [(NAME, ROWS, 0)]
    assert metrics.draw_losses(curves, file, heard, title=NAME, marks=[(5, NAME)])
    assert file.stat().st_size > 1000 and not heard.warnings


def test_names_stand_in_svg_and_log_axes_keep_their_numbers() -> None:
    with canvas("key") as drawn:
        axes = drawn.add_subplot()
        axes.plot([1, 100], [1, 2], label=NAME)
        axes.set_xscale("log")
        axes.set_yticks([1, 2], [NAME, "plain"])
        axes.set_title(NAME)
        axes.legend()
        figure = finished(drawn, Figure("key", "t", "caption", ""), png=True)
    assert figure.caption == "caption" and figure.png
    assert figure.svg.count("cost_$5_or_$6") == 3
    assert "\x1b" not in figure.svg and "<b>" not in figure.svg and "\\x1b[2J" in figure.svg
    # the ticks of the logarithmic axis are formulas, set as such: their source is a comment only
    assert figure.svg.count("mathdefault") == figure.svg.count("<!-- $\\mathdefault{")


def test_a_picture_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure as Drawn

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no such font")

    monkeypatch.setattr(Drawn, "savefig", fail)
    heard = Heard()
    assert not metrics.draw_losses([("a", ROWS, 0)], tmp_path / "a.png", heard, title="t")
    assert heard.warnings == ["no a.png: ValueError: no such font"]
    with canvas("key") as drawn:
        assert finished(drawn, Figure("key", "t", "c", "")).caption.startswith("Not shown")
