"""Tables, figures and the page that a study leaves: what they say, and that they stand alone."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_studies import BUDGET, growth_study, made_arm, made_run, made_study, sweep

from growkit.cli.main import main
from growkit.study.caveats import limits
from growkit.study.figures import band_of, common_start, draw_figures, growths, line_look, loss_band
from growkit.study.page import markdown, studies_in, study_page, write_study
from growkit.study.results import Phase, StudyResult, read_result, result_from
from growkit.study.run_records import read_record
from growkit.study.savings import arm_figures
from growkit.study.table import (
    comparisons,
    equal_flops,
    equal_parameters,
    rich_tables,
    tables,
)

EVIL = "<script>alert('x')</script> | $\\alpha & _x"


class Parsed(HTMLParser):
    """Tags, text of cells, and whatever would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.figures: list[str] = []
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append(tag)
        if "id" in values:
            self.ids.append(str(values["id"]))
        if tag == "figure":
            self.figures.append(str(values["id"]))
        for name in ("src", "href", "xlink:href", "data", "action"):
            if not str(values.get(name, "#")).startswith("#"):
                self.outside.append(str(values[name]))


@pytest.fixture(scope="module")
def result() -> StudyResult:
    return growth_study()


@pytest.fixture(scope="module")
def written(result: StudyResult, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("studies") / "new" / "made-up"
    return {path.name: path for path in write_study(result, folder, command="growkit study x.yaml")}


def test_files(written: dict[str, Path]) -> None:
    assert list(written) == [
        "study.json", "table.md", "loss.svg", "loss.png", "loss-end.svg", "loss-end.png",
        "differences.svg", "differences.png", "sweeps.svg",
        "series-head_similarity.svg", "study.html",
    ]  # fmt: skip
    folder = written["study.json"].parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(written)  # no .partial
    for name in written:
        if name.endswith(".svg"):
            assert ElementTree.parse(written[name]).getroot().tag.endswith("svg")


def test_json_gives_the_result_back(written: dict[str, Path], result: StudyResult) -> None:
    read = result_from(json.loads(written["study.json"].read_text()))
    assert read.arms[1] == replace(result.arms[1], sweep=read.arms[1].sweep)
    assert study_page(read, []) == study_page(result, [])  # a page can be made from the file


def test_figures_are_pictures_of_the_data(written: dict[str, Path]) -> None:
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(written["loss.png"].read_bytes()))[..., :3]
    assert pixels.shape[1] > 1000 and 0.005 < (pixels < 0.6).any(axis=-1).mean() < 0.5
    svg = written["loss.svg"].read_text()
    for label in ("scratch", "signal", "noise", "common source"):
        assert label in svg


def test_same_data_same_bytes(result: StudyResult, written: dict[str, Path]) -> None:
    again = {figure.key: figure for figure in draw_figures(result)}
    assert again["loss"].svg == written["loss.svg"].read_text()
    assert again["loss"].png == written["loss.png"].read_bytes()


def test_page_stands_alone(written: dict[str, Path]) -> None:
    text = written["study.html"].read_text()
    parsed = Parsed(text)
    assert parsed.outside == [] and len(parsed.ids) == len(set(parsed.ids))
    assert not {"script", "link", "iframe", "object", "img", "form"} & set(parsed.tags)
    assert not re.search(r"(src|href|action)\s*=\s*[\"']?\s*(https?:)?//", text)
    assert "@import" not in text and not re.search(r"url\(\s*[\"']?http", text)
    assert parsed.figures == [
        "loss", "loss-end", "differences", "sweeps", "series-head_similarity",
    ]  # fmt: skip
    ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def test_page_says_what_was_asked_run_found_and_left_open(written: dict[str, Path]) -> None:
    text = written["study.html"].read_text()
    for part in (
        "Does it pay?", "1e+15 training FLOPs", "seeds 1, 2, 3: 9 of 9 runs are finished",
        "processor two cores, torch 2.13", "2026-11-22", "signal_heads x2 (exact, loss +0.0000)",
        "signal against scratch, at equal FLOPs: lower by 0.0300",
        "noise against scratch, at equal FLOPs: no difference shown (",
        "at the edge of its sweep", "25 % of the steps with seed 1", "drops in the decay",
        "<pre>growkit study x.yaml</pre>", "name: made-up\narms:\n- scratch",
    ):  # fmt: skip
        assert part in text, part


def evil_study() -> StudyResult:
    arms = (
        made_arm("a", {1: 3.5, 2: 3.6}, label=EVIL, failed={3: EVIL}),
        made_arm("b", {1: 3.4, 2: 3.55}, label="_hidden", source=0.2, sweep=sweep()),
    )
    run = replace(arms[1].runs[0], series={EVIL: [(0.0, 1.0), (1.0, 0.5)]})
    arms = (arms[0], replace(arms[1], runs=(run, *arms[1].runs[1:])))
    return made_study(*arms, name=EVIL, question=EVIL, recipe={"name": EVIL}, machine={"os": EVIL})


STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


def test_committed_studies_are_what_their_records_say() -> None:
    """And their tables are those of today: a page is made from study.json and from nothing else."""
    names = [path.name for path in studies_in(STUDIES)]
    assert names == [
        "conversion", "group-differentiated", "growth", "growth-1m", "late-width", "moe-late",
        "optimizer", "plateau", "progressive", "progressive-choices", "progressive-depth",
        "rate-transfer", "ratio", "symmetry",
    ]  # fmt: skip
    for name in names:
        result = read_result(STUDIES / name)
        assert (STUDIES / name / "table.md").read_text() == markdown(result)
        again = json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
        assert (STUDIES / name / "study.json").read_text() == again
        for phase in {p.key: p for arm in result.arms for r in arm.runs for p in r.phases}.values():
            record = read_record(STUDIES / name / "records" / f"{phase.key}.json")
            assert record is not None and record.last_loss == phase.last_loss
            assert (record.steps, record.learning_rate) == (phase.steps, phase.learning_rate)


def test_pages_from_committed_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("symmetry/study.json", "ratio/study.json"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_bytes((STUDIES / file).read_bytes())
    pages = tmp_path / "pages"
    assert main(["study", str(tmp_path), "--report", "--json", "--out", str(pages)]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert written == [str(pages / name) for name in ("ratio.html", "symmetry.html")]
    text = (pages / "symmetry.html").read_text()
    said = text.index("split (the default) against even, at equal FLOPs, equal parameters: lower")
    assert said < text.index("<h2>The arms</h2>") < text.index("<h2>Figures</h2>")
    assert "small, signal heads x2" in text and "that of split (the default)" in text
    assert "prefers-color-scheme: dark" in text and "stroke: var(--c0)" in text
    digest = re.search(r">[0-9a-f]{12,16}<", text)
    assert digest is None
    assert main(["study", str(tmp_path / "ratio")]) == 2
    assert "Add --report" in capsys.readouterr().err
    (tmp_path / "ratio" / "study.json").write_text('{"format": 1, "arms": [{"sweep": null}]}')
    assert main(["study", str(tmp_path / "ratio"), "--report"]) == 1
    assert "is no result of a study" in capsys.readouterr().err
    assert main(["study", str(pages), "--report"]) == 2
    assert "There is no study" in capsys.readouterr().err


def test_a_borrowed_sweep_is_not_an_arms_own(result: StudyResult) -> None:
    """One plot a sweep, on a scale that shows all its losses, and the borrower says whose it is."""
    recipe = {"arms": {"scratch": {}, "signal": {"training": {"learning_rate": {"of": "scratch"}}}}}
    scratch, signal, noise = result.arms
    arms = (scratch, replace(signal, sweep=scratch.sweep), noise)
    borrowed = replace(result, recipe=recipe, arms=arms)
    assert list(borrowed.sweeps()) == ["scratch"] and list(result.sweeps()) == ["scratch", "signal"]
    assert not [line for line in limits(borrowed) if "at the edge of its sweep" in line]
    (plot,) = [figure.svg for figure in draw_figures(borrowed, png=False) if figure.key == "sweeps"]
    assert ">scratch</text>" in plot and "signal" not in plot
    assert "that of scratch" in study_page(borrowed, [])


def test_names_are_text(tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in write_study(evil_study(), tmp_path)}
    page = files["study.html"].decode()
    assert "<script" not in page and "&lt;script&gt;" in page
    ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    table = files["table.md"].decode()
    assert "<script" not in table
    header, rule, row, *_ = [line for line in table.splitlines() if line.startswith("|")]
    for line in (header, rule, row):
        assert len(re.findall(r"(?<!\\)\|", line)) == 9  # eight columns; the | of a name is none
    assert {path.parent for path in tmp_path.iterdir()} == {tmp_path}  # keys make no folders


def test_tables_say_what_the_runs_say(result: StudyResult) -> None:
    table = equal_flops(result)
    signal, *others = table.rows
    cells = dict(zip(table.columns, signal, strict=True))
    assert [row[0] for row in others] == ["scratch", "noise"]
    assert cells["arm"] == "signal" and cells["seeds"] == "3 of 3"
    assert cells["final loss"] == "3.4867 ± 0.0757"
    assert cells["difference (95 % CI)"].startswith("scratch: -0.0300 (-0.03")
    assert cells["learning rate"] == "0.003 then 0.001 (edge of the sweep)"
    assert cells["saving"].startswith("+12.9 % (") and cells["wall time"] == "20 min"
    scratch = next(row for row in table.rows if row[0] == "scratch")
    assert "reference" in scratch and "1e+15" in scratch
    assert "not reached" in str(equal_flops(made_study(
        made_arm("a", {1: 3.0}), made_arm("b", {1: 3.5}, source=0.2))).rows)  # fmt: skip


def test_arms_without_a_loss_come_last_and_are_shown() -> None:
    table = equal_flops(
        made_study(
            made_arm("none", {}), made_arm("nan", {1: math.nan, 2: 3.0}),
            made_arm("bad", {1: 9.0}), made_arm("good", {1: 3.0}),
            made_arm("inf", {1: math.inf, 2: math.inf}),
        )
    )  # fmt: skip
    assert [row[0] for row in table.rows] == ["good", "bad", "none", "nan", "inf"]
    assert [row[3] for row in table.rows[2:]] == ["unfinished", "not finite", "not finite"]


def test_equal_parameters() -> None:
    losses = {1: 3.5, 2: 3.6, 3: 3.4}
    arms = [
        made_arm("small", losses, parameters=400_000, shape="small"),
        made_arm("ratio 1:1", losses, parameters=1_000_000, shape="x"),
        made_arm("ratio 3:1", losses, parameters=1_009_000, shape="y"),
        made_arm("large", losses, parameters=1_011_000, shape="z"),
    ]
    (table,) = equal_parameters(made_study(*arms))
    assert sorted(row[0] for row in table.rows) == ["ratio 1:1", "ratio 3:1"]
    assert "1.000 M to 1.009 M" in table.title
    assert "small" not in str(table.rows)  # nor as a reference: it is of another size
    same = made_study(*arms[1:3])
    assert equal_parameters(same) == []
    assert equal_flops(same).title.startswith("Equal FLOPs and equal parameters:")


def test_verdict_table_and_rich(result: StudyResult) -> None:
    from rich.console import Console

    table = comparisons(result)
    assert [row[2] for row in table.rows] == ["lower", "no difference shown"]
    console = Console(width=200, file=io.StringIO())
    console.print(*rich_tables(result), *rich_tables(evil_study()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "not shown" not in text and "reference" in text  # verdicts are sentences, not cells
    assert "<script>alert('x')</script>" in text


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_tables_break_between_words(width: int) -> None:
    from rich.console import Console

    console = Console(width=width, file=io.StringIO())
    console.print(*rich_tables(growth_study()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("parameters", "reference", "scratch", "(edge", "learning"):
        assert word in text
    assert max(map(len, text.splitlines())) <= width


def test_measures(result: StudyResult) -> None:
    table = tables(result)[-1]
    assert table.columns[:3] == ("measure", "scratch", "signal") and len(table.rows) == 1
    assert table.rows[0][0] == "bits per byte" and table.rows[0][2] == "1.7433 ± 0.0379"
    assert "Other measures" not in markdown(made_study(made_arm("none", {})))


def test_figures_as_numbers(result: StudyResult) -> None:
    values = json.loads(json.dumps([one.to_dict() for one in arm_figures(result)]))
    assert values[1]["final_loss"]["mean"] == pytest.approx(3.486667, abs=1e-6)
    assert values[1]["saving"]["mean"] == pytest.approx(1 - 10**-0.06, abs=2e-3)
    assert values[1]["comparisons"][0]["difference"]["mean"] == pytest.approx(-0.03)
    assert values[0]["saving"] is None and values[1]["learning_rate_at_edge"] is True


def test_limits_name_what_is_missing() -> None:
    """Each of them, and none of them on a study that has nothing to hide."""
    losses = {1: 3.5, 2: 3.6, 3: 3.4}
    short = made_arm("short", losses)
    less = [Phase(**vars(run.phases[0]) | {"flops": BUDGET / 2}) for run in short.runs]
    runs = tuple(replace(run, phases=(phase,)) for run, phase in zip(short.runs, less, strict=True))
    said = "\n".join(limits(made_study(
        made_arm("whole", losses), made_arm("failed", {1: 3.5, 2: 3.7}, failed={3: "no memory"}),
        made_arm("begun", {1: 3.5}), made_arm("nan", losses | {2: math.nan}),
        made_arm("edge", losses, sweep=sweep(1e-3)), replace(short, runs=runs),
        made_arm("odd", losses, source=0.2, shape="odd"),
        made_arm("slow", {s: v + 1 for s, v in losses.items()}, source=0.2),
    )))  # fmt: skip
    for part in (
        "failed: the run of seed 3 failed: no memory", "Not finished: begun (seeds 2, 3).",
        "One seed, so the spread is not known: begun.", "not finite: nan (seed 2).",
        "lie outside: edge (0.001).", "short: spent 50.0 % of the budget (seed 1).",
        "begun against whole: one seed: no statement", "With two seeds",
        "from scratch: odd.", "did not reach it: slow (seeds 1, 2, 3).",
    ):  # fmt: skip
        assert part in said, part
    near = {s: v - 0.1 - 0.015 * s for s, v in losses.items()}  # 15 standard errors
    many = [made_arm(f"x{i}", near) for i in range(21)]
    said = "\n".join(limits(made_study(made_arm("a", losses), *many)))
    assert (
        "21 comparisons with 3 seeds: Holm's correction first passes a mean difference of 20."
        in said
    )
    clean = {s: v - 0.1 - 0.001 * s for s, v in losses.items()}
    left = limits(made_study(made_arm("a", losses), made_arm("b", clean)))
    assert len(left) == 2 and left[0].startswith("The intervals cover the seeds alone")


@pytest.mark.parametrize("arms", [0, 1, 15])
def test_unfinished_studies_and_many_arms(arms: int, tmp_path: Path) -> None:
    """No finished arm at all is a page too, and fifteen arms have fifteen looks."""
    losses = {1: 3.5, 2: 3.6, 3: 3.4}
    made = [made_arm(f"arm{i}", losses, source=0.2 * (i % 2)) for i in range(arms)]
    waiting = made_arm("waiting", {}, failed={1: "killed"})
    files = {p.name: p for p in write_study(made_study(*made, waiting), tmp_path)}
    text = files["study.html"].read_text()
    assert f"{3 * arms} of {3 * arms + 3} runs" in text and "killed" in text
    assert ("loss.png" in files) == (arms > 0)
    if arms == 0:
        assert "Loss against compute: Not shown: it needs a finished run." in text
    else:
        svg = files["loss-end.svg"].read_text()
        assert all(f"arm{number}</text>" in svg for number in range(arms))
    assert markdown(made_study(*made, waiting)) == files["table.md"].read_text()


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_diverged_runs_leave_the_picture(loss: float) -> None:
    """The others are still drawn at their own scale."""
    from matplotlib.figure import Figure

    from growkit.study.figures import _end

    study = made_study(made_arm("good", {1: 3.5, 2: 3.6}), made_arm("bad", {1: loss, 2: loss}))
    axes = Figure().add_subplot()
    assert _end(axes, study)
    low, high = axes.get_ylim()
    assert 3.4 < low < 3.5 and 3.6 < high < 3.9
    assert all(figure.svg for figure in draw_figures(study)[:2])


def test_many_lines_look_different() -> None:
    grown = [made_arm(f"arm{i}", {}, from_scratch=False, shape=f"shape{i}") for i in range(21)]
    scratch = [made_arm(f"scratch{i}", {}, shape=f"shape{i}") for i in range(21)]
    study = made_study(*grown, *scratch)
    assert len({tuple(line_look(study, arm).items()) for arm in study.arms}) == 42


def test_from_scratch_is_dashed_in_the_colour_of_its_grown_twin() -> None:
    study = made_study(
        made_arm("scratch", {}, shape="wide"),
        made_arm("grown", {}, from_scratch=False, shape="wide"),
        made_arm("grown otherwise", {}, from_scratch=False, shape="wide"),
        made_arm("alone", {}, shape="deep"),
    )
    scratch, grown, otherwise, alone = (line_look(study, arm) for arm in study.arms)
    assert scratch == grown | {"linestyle": "--"}
    assert grown["linestyle"] == otherwise["linestyle"] == alone["linestyle"] == "-"
    assert len({look["color"] for look in (grown, otherwise, alone)}) == 3


def test_figures_that_lost_their_data_go_away(tmp_path: Path) -> None:
    write_study(growth_study(), tmp_path)
    (tmp_path / "notes.png").write_text("mine")
    write_study(made_study(made_arm("waiting", {})), tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert not [name for name in left if name.startswith("series-")]
    assert "loss.svg" not in left and "loss.png" not in left and "notes.png" in left


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loss.png").write_text("of an earlier run")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)
    notes: list[str] = []
    files = [path.name for path in write_study(growth_study(), tmp_path, note=notes.append)]
    assert files == ["study.json", "table.md", "study.html"]
    assert len(notes) == 1 and "pip install 'growkit[plots]'" in notes[0]
    assert "No figures:" in (tmp_path / "study.html").read_text()
    assert (tmp_path / "loss.png").exists()


def test_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from made_up_studies import growth_study\n"
        "from growkit.study.page import write_study\n"
        "write_study(growth_study(), Path(sys.argv[2]))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", program, here, str(tmp_path)], check=True)


def test_curves() -> None:
    arm = made_arm("a", {1: 3.0, 2: 4.0}, source=0.2)
    band = loss_band(arm)
    assert band is not None
    assert np.allclose(band.high - band.low, 1.0) and np.allclose(band.mean - band.low, 0.5)
    ((flops, loss),) = growths(arm)
    assert flops == pytest.approx(0.2 * BUDGET) and loss == pytest.approx(
        3.5 - 0.5 * math.log10(0.2)
    )
    assert band.part(0.2 * BUDGET, math.inf).places[0] == pytest.approx(0.2 * BUDGET)
    assert band.until(0.2 * BUDGET).places[-1] == pytest.approx(0.2 * BUDGET)
    jump = band_of([[(1, 5.0), (2, 4.0), (2, 4.5), (3, 3.0)]])  # a growth that is not exact
    assert jump is not None
    assert jump.until(2).mean.tolist() == [5, 4] and jump.part(2, 9).mean.tolist() == [4, 4.5, 3]
    other: list[list[tuple[float, float]]] = [[(0, 0), (2, 2), (4, 4)], [(1, 2), (3, 4)]]
    mixed = band_of(other)  # y = x and y = x + 1, together at 2 alone
    assert mixed is not None and mixed.places.tolist() == [2] and mixed.mean.tolist() == [2.5]
    assert band_of([]) is None and band_of([[(0.0, 1.0)], []]) is None


def test_common_sources() -> None:
    """Arms grown from the same runs share their beginning; a source of its own is not shared."""
    shared: list[Any] = [made_arm(name, {1: 3.0}, source=0.2) for name in "ab"]
    alone = made_arm("c", {1: 3.0}, source=0.2)
    own = made_run(1, 3.0, key="c", source=0.2)
    first = replace(own.phases[0], key="another source")
    alone = replace(alone, runs=(replace(own, phases=(first, own.phases[1])),))
    arms = [*shared, alone, made_arm("scratch", {1: 3.0})]
    starts = [common_start(arm, arms) for arm in arms]
    assert starts == pytest.approx([0.2 * BUDGET, 0.2 * BUDGET, 0, 0])
