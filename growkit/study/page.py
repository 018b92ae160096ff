"""What a study leaves in its folder for people: the page, ``table.md`` and the figures. No torch.

Works while runs are still missing, and on what others have run: a folder with ``study.json``, which
may be all that is committed of a study, gives the same page again.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from growkit.core.errors import UsageError
from growkit.core.quantities import human_count, human_seconds, percent
from growkit.core.writing import write_whole
from growkit.report.canvas import Figure
from growkit.report.page import (
    figures_html,
    folded_html,
    list_html,
    page_html,
    recipe_html,
    section_html,
    table_html,
)
from growkit.study.caveats import limits
from growkit.study.figures import SERIES
from growkit.study.race import race_lines
from growkit.study.results import STUDY_FILE, Arm, StudyResult, read_result, start_of
from growkit.study.savings import arm_figures
from growkit.study.scratch_curve import scratch_savings
from growkit.study.statistics import findings, seeds_text, verdicts
from growkit.study.table import Table, equal_parameters, markdown_text, tables
from growkit.surgery.operators import OPERATORS

PAGE = "study.html"
TABLE = "table.md"


def write_study(
    result: StudyResult,
    folder: Path,
    *,
    command: str | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Write ``study.json``, ``table.md``, the figures and ``study.html``, each whole or not at all.

    Args:
        command: the one that reproduces the study, for the page.
        note: is told what could not be written. Without matplotlib that is the figures, and those
            that lie there stay.

    Returns:
        The files, ``study.json`` first and the page last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [result.write(folder), write_whole(folder / TABLE, markdown(result))]
    figures, without = _figures(result)
    if without:
        note(without)
    written += _write_figures(figures, folder)
    page = study_page(result, figures, command=command, note=without)
    return [*written, write_whole(folder / PAGE, page)]


def studies_in(folder: Path) -> list[Path]:
    """The folders of studies: ``folder`` itself, or those in it.

    Raises:
        UsageError: there is none.
    """
    found = sorted(path.parent for path in folder.glob(f"*/{STUDY_FILE}"))
    return [folder] if (folder / STUDY_FILE).is_file() or not found else found


def write_pages(folder: Path, out: Path) -> list[Path]:
    """Write ``OUT/NAME.html`` for every study in a folder, from its ``study.json`` alone.

    Returns:
        The pages.

    Raises:
        UsageError, CheckpointError: there is no study, or one that cannot be read; nothing is
            written then.
    """
    results = [read_result(path) for path in studies_in(folder)]
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for result in results:
        figures, without = _figures(result, png=False)
        page = study_page(result, figures, note=without)
        written.append(write_whole(out / f"{Path(result.name).name}.html", page))
    return written


def markdown(result: StudyResult) -> str:
    """``table.md``: the verdicts in words, the tables and the limits."""
    said = (*_savings(result), *verdicts(result), *_race(result))
    listed = "\n".join(f"* {markdown_text(line)}" for line in said)
    cannot = "\n".join(f"* {markdown_text(line)}" for line in limits(result))
    shown = "\n".join(table.markdown() for table in tables(result))
    name, question = markdown_text(result.name), markdown_text(result.question)
    return (
        f"# {name}\n\n{question}\n\n{listed}\n\n{shown}\nWhat this study cannot say:\n\n{cannot}\n"
    )


def _figures(result: StudyResult, *, png: bool = True) -> tuple[list[Figure], str]:
    """The figures, and why there are none."""
    from growkit.study.figures import draw_figures

    try:
        return draw_figures(result, png=png), ""
    except UsageError as error:
        return [], f"No figures: {error}"


def _write_figures(figures: list[Figure], folder: Path) -> list[Path]:
    """An SVG each, a PNG of those that have one; figures that have no data any more go away."""
    written = []
    kept = {f"{figure.key}.svg" for figure in figures}
    for old in folder.glob(f"{SERIES}*.svg") if figures else ():
        if old.name not in kept:
            old.unlink()
    for figure in figures:
        for ending, content in ((".svg", figure.svg), (".png", figure.png)):
            target = folder / (figure.key + ending)
            if content:
                written.append(write_whole(target, content))
            elif not figure.svg:
                target.unlink(missing_ok=True)
    return written


def study_page(
    result: StudyResult, figures: Sequence[Figure], *, command: str | None = None, note: str = ""
) -> str:
    """The HTML text: conclusions, table, figures, limits, and how it was done.

    Args:
        figures: as :func:`growkit.study.figures.draw_figures` gives them.
        command: reproduces the study; by default the one that runs the recipe on the page.
        note: stands where the figures are (why there are none).
    """
    command = command or f"growkit study study.yaml --out {shlex.quote(result.name)}"
    asked, main, *others = tables(result)
    # What an arm is compared with stands in the conclusions already.
    main = main.without("difference (95 % CI)")
    alike = [table for table in others if table in equal_parameters(result)]
    rest = [table for table in others if table not in alike]
    plots = f"<p>{escape(note)}</p>\n" if note else ""
    plots += figures_html(figures) if figures else ""
    recipe = recipe_html("The recipe: study.yaml", result.recipe)
    body = (
        f'<p class="lead">{escape(result.question)}</p>\n'
        + section_html("What it found", _conclusions(result) + _folded("Comparisons", [asked]))
        + section_html(
            "The arms",
            _table(main)
            + _folded("At equal parameters", alike)
            + "".join(_folded(table.title, [table]) for table in rest),
        )
        + (section_html("The race", list_html(_race(result))) if result.race else "")
        + section_html("Figures", plots)
        + section_html("What it cannot say", list_html(limits(result)))
        + section_html("What was run", list_html(run_text(result)) + _table(arms_table(result)))
        + section_html("Reproduce it", f"<pre>{escape(command)}</pre>\n{recipe}")
    )
    return page_html(f"Study: {result.name}", body)


def _race(result: StudyResult) -> list[str]:
    """How arms were put out by short runs, and how far those can be trusted."""
    labels = {arm.name: arm.label for arm in result.arms}
    return race_lines(result.race, labels) if result.race else []


def _savings(result: StudyResult) -> list[str]:
    """What every grown arm saves against from scratch, where that can be read."""
    return [one.sentence() for one in scratch_savings(result)]


def _conclusions(result: StudyResult) -> str:
    """The lowest loss, what was saved, and the answer to every comparison."""
    ranked = sorted(arm_figures(result), key=lambda one: one.order)
    best = next((one for one in ranked if one.loss and isfinite(one.loss.mean)), None)
    lowest = ""
    if best is not None and best.loss is not None and len(ranked) > 1:
        spread = "" if best.loss.deviation is None else f" ± {best.loss.deviation:.4f}"
        lowest = (
            f"<p>Lowest final loss: <strong>{escape(best.arm.label)}</strong>, "
            f"{best.loss.mean:.4f}{spread} nats per token.</p>\n"
        )
    kinds = [
        one.direction + ("" if one.survives or one.direction == "none" else " weak")
        for one in findings(result)
    ]
    lines = "".join(f"<li>{escape(line)}</li>\n" for line in _savings(result)) + "".join(
        f'<li class="{kind}">{escape(line)}</li>\n'
        for kind, line in zip(kinds or ["unknown"], verdicts(result), strict=True)
    )
    return f'{lowest}<ul class="verdicts">{lines}</ul>\n'


def run_text(result: StudyResult) -> list[str]:
    """Budget, data, machine, how far the study is, and what its bases are."""
    planned, done = len(result.arms) * len(result.seeds), sum(len(arm.runs) for arm in result.arms)
    seconds = sum(run.seconds for arm in result.arms for run in arm.runs)
    machine = ", ".join(f"{key} {value}" for key, value in result.machine.items())
    bases = result.recipe.get("bases")
    return [
        f"Budget: {result.budget:.3g} training FLOPs for every arm"
        + ("" if result.one_budget else " that has none of its own")
        + ", what its source cost included.",
        f"Sequences of {result.sequence_length:,} tokens"
        + (
            f"; every held-out loss is of {result.held_out_tokens:,} predicted tokens."
            if result.held_out_tokens
            else "."
        ),
        f"{len(result.arms)} arms with {seeds_text(result.seeds)}: {done} of {planned} runs are "
        f"finished{f' ({human_seconds(seconds)} of one worker)' if done else ''}.",
        *(
            f"Base {result.label(name)!r}: {shape_text(result.recipe, name)}."
            for name in (bases if isinstance(bases, dict) else ())
        ),
        f"Machine: {machine}." if machine else "Machine: not recorded.",
        f"Last run: {result.date}." if result.date else "No run is finished.",
    ]


def arms_table(result: StudyResult) -> Table:
    """What each arm does, phase by phase, its final model, and how its learning rate was found."""
    columns = (
        "arm",
        "what it does",
        "final model",
        "learning rate",
        "parameters",
        "FLOPs per token",
    )
    return Table(
        "Arms",
        columns,
        tuple(
            (
                arm.label,
                _phases(arm),
                _final_model(result, arm),
                _rate(result, arm),
                human_count(arm.parameters),
                human_count(arm.flops_per_token),
            )
            for arm in result.arms
        ),
        "Loss in brackets: what the growth itself changed, before a step. FLOPs per token: of "
        "training the final model.",
        words=4,
    )


def _phases(arm: Arm) -> str:
    if not arm.runs:
        return "from scratch" if arm.from_scratch else "not finished"
    texts: list[str] = []
    for number, phase in enumerate(arm.runs[0].phases):
        change = phase.change or ("from scratch" if not texts else "trained on")
        exactness = (phase.exactness or "").partition(";")[0].replace("not-exact", "not exact")
        promised = [exactness] if exactness else []
        if number:
            # What the growth itself did to the loss, before a single step.
            jumps = [
                run.phases[number].first_loss - run.phases[number - 1].last_loss for run in arm.runs
            ]
            promised.append(f"loss {fmean(jumps):+.4f}")
        said = f" ({', '.join(promised)})" if promised else ""
        texts.append(f"{change}{said}, {human_count(phase.tokens)} tokens")
    return " → ".join(texts)


def _final_model(result: StudyResult, arm: Arm) -> str:
    """The shape in words; where the recipe does not say it, the first arm that has the same."""
    return shape_text(result.recipe, arm.name) or next(
        f"as {other.label}" if other.name != arm.name else "its own"
        for other in result.arms
        if other.shape == arm.shape
    )


def shape_text(recipe: Mapping[str, Any], name: str, seen: tuple[str, ...] = ()) -> str:
    """The shape of a base or an arm in words: of its config, or what it continues from and how."""
    start = start_of(recipe, name)
    if "config" in start:
        return config_text(_mapping(start["config"]))
    if "shape_of" in start and name not in seen:
        return shape_text(recipe, str(start["shape_of"]), (*seen, name))
    changes = [
        f"{key.replace('_', ' ').replace('ffn', 'FFN')} {size}"
        for key, size in _mapping(start.get("grow")).items()
        if key in OPERATORS
    ]
    target = _mapping(start.get("convert")).get("to")
    changes += [f"converted to {str(target).replace('_', ' ')}"] if target else []
    return ", ".join([str(start.get("base") or start.get("checkpoint") or ""), *changes])


def config_text(config: Mapping[str, Any]) -> str:
    """Layers, widths and heads of a model config."""
    heads, noise = config.get("num_attention_heads"), config.get("num_noise_heads")
    shown = [str(config.get("attention") or config.get("model_type", "")).upper()]
    for key, text in (
        ("num_hidden_layers", "{} layers"),
        ("hidden_size", "hidden {}"),
        ("intermediate_size", "FFN {}"),
    ):
        if key in config:
            shown.append(text.format(config[key]))
    if isinstance(heads, int) and isinstance(noise, int):
        shown.append(f"{heads - noise} signal and {noise} noise heads")
    elif heads is not None:
        shown.append(f"{heads} heads")
    return ", ".join(part for part in shown if part)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _rate(result: StudyResult, arm: Arm) -> str:
    owner = result.rate_owner(arm.name)
    if owner != arm.name:
        return f"that of {result.label(owner)}"
    if arm.sweep is None:
        return "given"
    tried = ", ".join(f"{rate:.3g}" for rate, _ in arm.sweep.losses)
    edge = ", at the edge" if arm.sweep.at_edge else ""
    return f"{arm.sweep.chosen:.3g} of {tried} on {percent(arm.sweep.share)} of the steps{edge}"


def _table(table: Table) -> str:
    note = f'<p class="note">{escape(table.note)}</p>\n' if table.note else ""
    return table_html(table.columns, table.rows, table.words) + note


def _folded(title: str, shown: Sequence[Table]) -> str:
    """Tables that only some readers want; none for no tables."""
    if not shown:
        return ""
    if len(shown) == 1:
        lines = len(shown[0].rows)
        return folded_html(f"{title} ({lines} line{'' if lines == 1 else 's'})", _table(shown[0]))
    html = "".join(f"<h3>{escape(table.title)}</h3>\n{_table(table)}" for table in shown)
    return folded_html(f"{title} ({len(shown)} tables)", html)
