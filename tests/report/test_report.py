"""The report is one page that stands alone; it is parsed, and opened in a browser where one is."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from grown_runs import continue_recipe, grow, make_source
from training_runs import make, write_text

from growkit.cli.main import main
from growkit.core.errors import UsageError
from growkit.report import read_runs, write_report
from growkit.report.figures import FIGURES
from growkit.training import train
from growkit.training.metrics import read_metrics

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
KEYS = [key for key, *_ in FIGURES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base run, and one that goes on from its growth."""
    folder = tmp_path_factory.mktemp("runs")
    text = write_text(folder / "king.txt")
    base = make_source(text, folder / "base")
    grown = grow(base, folder / "grown")
    recipe = continue_recipe(text, grown, eval_steps=2, logging_steps=1)
    trained = train(recipe, folder / "grown <trained>").out
    _as_if_with_experts(trained / "training" / "metrics.jsonl")
    return [base, trained]


def _as_if_with_experts(metrics: Path) -> None:
    """Add what a run with experts logs beside the rest."""
    rows = read_metrics(metrics)
    for row in rows:
        if "probe" in row:
            row["probe"] |= {"expert_load_max": [1.5, 1.2], "expert_load_min": [0.1, 0.9]}
        if "loss" in row:
            row["router_aux_loss"] = 2.1
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    assert main(["report", *map(str, runs), "-q", "--out", str(runs[0].parent / "page.html")]) == 0
    return runs[0].parent / "page.html"


class Parsed(HTMLParser):
    """Figures with their elements, table cells, and whatever points out of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figures: dict[str, list[str]] = {}
        self.cells: list[str] = []
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if "id" in values:
            self.ids.append(str(values["id"]))
        if tag == "figure":
            self.figures[str(values["id"])] = []
        elif "figure" in self.open:
            self.figures[list(self.figures)[-1]].append(tag)
        if tag == "td":
            self.cells.append("")
        for name in ("src", "href", "xlink:href"):
            if not str(values.get(name, "#")).startswith("#"):
                self.outside.append(str(values[name]))
        if tag in ("script", "link", "iframe", "object", "img"):
            self.outside.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag != "meta":
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def test_page_is_whole_and_asks_nothing_of_a_network(page: Path) -> None:
    text = page.read_text()
    parsed = Parsed(text)
    assert parsed.open == [] and parsed.outside == []
    assert "@import" not in text and "url(http" not in text
    assert len(parsed.ids) == len(set(parsed.ids))
    ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))  # well-formed XML too
    assert not list(page.parent.glob("*.partial"))


def test_every_figure_is_drawn(page: Path) -> None:
    parsed = Parsed(page.read_text())
    assert list(parsed.figures) == KEYS
    assert all(
        tags.count("svg") == 1 and tags.count("path") > 5 for tags in parsed.figures.values()
    )


def test_table_says_what_the_runs_say(page: Path, runs: list[Path]) -> None:
    cells = Parsed(page.read_text()).cells
    width = len(cells) // 2
    base, trained = cells[:width], cells[width:]
    record = json.loads((runs[1] / "growkit_training.json").read_text())
    assert base[0] == "base" and trained[0] == "grown <trained> (grown)"
    assert trained[1] == "base" and trained[5] == base[4] == f"{3 * 64}"
    assert trained[2] == f"{record['parameters']:,}" and trained[4] == f"{6 * 64}"
    assert trained[7] == f"{record['eval_loss']:.4f}"
    assert trained[9] == f"{record['loss_before_growth']:.4f}" != ""


def test_runs_are_placed_behind_each_other(runs: list[Path]) -> None:
    base, trained = read_runs(runs)
    assert trained.parent == "base" and trained.grown and not base.grown
    tokens, losses = trained.series("eval_loss")
    rows = read_metrics(runs[1] / "training" / "metrics.jsonl")
    assert tokens == [192 + row["tokens"] for row in rows if "eval_loss" in row]
    assert losses == [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert base.flops_per_token is not None and trained.flops_per_token is not None
    assert trained.flops_per_token > base.flops_per_token
    assert trained.flops(tokens)[0] == base.flops_per_token * 192
    assert (
        trained.flops([192 + 100])[0] == base.flops_per_token * 192 + trained.flops_per_token * 100
    )
    alone = read_runs(runs[1:])[0]
    assert alone.parent is None and alone.tokens_before == 192  # the source says so
    reversed_ = read_runs(runs[::-1])
    assert [run.name for run in reversed_] == ["grown <trained>", "base"]
    assert reversed_[0].tokens_before == 192


def test_a_parent_is_found_wherever_its_growth_lies(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss against compute begins after the parent: in another folder, from a checkpoint of it,
    or read from elsewhere than where the run was started."""
    base, _ = runs
    text = base.parent / "king.txt"
    grown = grow(base, tmp_path / "elsewhere" / "grown")
    far = train(continue_recipe(text, grown, max_steps=1), tmp_path / "far").out
    checkpoint = base / "training" / "checkpoints" / "checkpoint-3"
    part = grow(checkpoint, tmp_path / "part-grown")
    monkeypatch.chdir(tmp_path)
    recipe = continue_recipe(text, Path("part-grown"), max_steps=1)
    part_run = train(recipe, tmp_path / "part").out
    monkeypatch.chdir("/")
    first, *rest = read_runs([base, far, part_run])
    assert first.flops_per_token is not None and part.is_dir()
    for run in rest:
        assert run.parent == "base" and run.tokens_before == 192
        assert run.flops_before == first.flops_per_token * 192 > 0
    manifest = far.parent / "elsewhere" / "grown" / "growkit.json"
    values = json.loads(manifest.read_text())
    values["parent"]["config_sha256"] = "0" * 64  # negative control: grown from another model
    manifest.write_text(json.dumps(values))
    assert read_runs([base, far])[1].parent is None


def test_stages_of_one_run(runs: list[Path], tmp_path: Path) -> None:
    """A run that grows while it trains: its stages behind each other, growths where they were."""
    from stage_runs import staged_values

    from growkit.training.read_recipe import make_recipe

    out = train(make_recipe(staged_values(runs[0].parent / "king.txt")), tmp_path / "run").out
    read = read_runs([out])
    assert [run.name for run in read] == [f"run, stage {i}" for i in range(len(read))]
    assert len(read) > 1
    whole = [row for row in read_metrics(out / "training" / "metrics.jsonl") if "eval_loss" in row]
    assert [t for run in read for t in run.series("eval_loss")[0]] == [r["tokens"] for r in whole]
    for before, after in itertools.pairwise(read):
        assert after.parent == before.name and after.grown
        assert after.tokens_before == before.tokens_before + before.tokens
        start, end = after.series("eval_loss")[1][0], before.series("eval_loss")[1][-1]
        assert start == pytest.approx(end, abs=1e-4)
        assert after.loss_before_growth == pytest.approx(end, abs=1e-4)
        kind = "head" if after is read[1] else "unit"  # the second growth is of FFN units
        tokens, alike = after.series(f"{kind}_similarity", probe=True)
        assert tokens[0] == after.tokens_before and alike[0] == pytest.approx(1, abs=1e-5)


def test_lines_that_are_drawn_are_the_data(runs: list[Path]) -> None:
    """The curve of the held-out loss, read from the axes themselves."""
    from matplotlib.figure import Figure

    from growkit.report.figures import losses_by_tokens

    read = read_runs(runs)
    axes = Figure().add_subplot()
    assert losses_by_tokens(axes, read)
    lines = {line.get_label(): line for line in axes.get_lines()}
    tokens, losses = read[1].series("eval_loss")
    assert lines["grown <trained>"].get_xdata().tolist() == tokens
    assert lines["grown <trained>"].get_ydata().tolist() == losses
    before = lines["grown <trained>: before growth"].get_ydata()
    assert set(before) == {read[1].loss_before_growth}
    assert any(list(line.get_xdata()) == [192, 192] for line in axes.get_lines())  # the growth


def test_what_a_run_has_not_is_said(tmp_path: Path, runs: list[Path]) -> None:
    plain = train(make(runs[0].parent / "king.txt", max_steps=3, warmup_steps=0, decay_steps=1,
                       probe_steps=0), tmp_path / "plain").out  # fmt: skip
    target = tmp_path / "report.html"
    figures = {figure.key: figure for figure in write_report(read_runs([plain]), target)}
    shown = ["loss-tokens", "loss-flops", "learning-rate", "throughput"]
    assert [key for key in KEYS if figures[key].svg] == shown
    assert list(Parsed(target.read_text()).figures) == shown
    assert "Lambda by layer: Not shown: it needs differential attention." in target.read_text()
    assert main(["report", str(plain), "-q"]) == 0
    assert (plain / "training" / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_unfinished_run(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(runs[1] / "training", out / "training")
    (run,) = read_runs([out])
    assert run.record == {} and run.flops_per_token is not None
    target = tmp_path / "r.html"
    write_report([run], target)
    assert (
        "run (unfinished)" in target.read_text() or "run (grown) (unfinished)" in target.read_text()
    )


def test_wrong_folders(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no training run" in capsys.readouterr().err
    with pytest.raises(UsageError, match="named twice"):
        read_runs([runs[0], runs[0]])
    assert main(["report", str(runs[0]), "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_without_matplotlib(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)
    with pytest.raises(UsageError, match=r"pip install 'growkit\[plots\]'"):
        write_report(read_runs(runs), tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_report_imports_no_torch(runs: list[Path]) -> None:
    program = (
        "import sys; from growkit.report import read_runs, write_report; from pathlib import Path\n"
        "write_report(read_runs([Path(a) for a in sys.argv[1:]]), Path(sys.argv[1]) / 'r.html')\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, *map(str, runs)], check=True)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_browser_shows_the_figures(page: Path, tmp_path: Path) -> None:
    """The page in a headless browser: what it laid out, and that the picture is not blank."""
    script = (
        "<script>const f = [...document.querySelectorAll('figure')].map(e => {"
        "const b = e.querySelector('svg').getBoundingClientRect();"
        "return [e.id, Math.round(b.width), Math.round(b.height)]});"
        "document.title = JSON.stringify(f);</script></body>"
    )
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", script))
    common = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2600"]
    common += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    dom = subprocess.run(
        [*common, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    boxes = json.loads(dom.split("<title>")[1].split("</title>")[0])
    assert [box[0] for box in boxes] == KEYS
    assert all(width > 300 and height > 150 for _, width, height in boxes)
    picture = tmp_path / "page.png"
    subprocess.run(
        [*common, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120
    )
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    dark = (pixels < 0.5).any(axis=-1)
    assert dark.mean() > 0.01  # lines and text
    assert dark[: len(dark) // 2].any() and dark[len(dark) // 2 :].any()
