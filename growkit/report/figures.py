"""The figures of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from statistics import fmean
from typing import Any

from growkit.report.canvas import (
    COLORS,
    SOFT,
    Figure,
    canvas,
    finished,
    legend_below,
    line_label,
    points,
)
from growkit.report.runs import Run

Draw = Callable[[Any, Sequence[Run]], bool]
Place = Callable[[list[int]], Any]
STYLES = ("-", "--", ":", "-.")
# Of runs: the third lies on the second where both are the same, and both are seen.
RUNS = ("-", "-", "--", ":")


def losses_by_tokens(axes: Any, runs: Sequence[Run]) -> bool:
    """Training (pale) and held-out loss."""
    drawn = _plain(
        axes, runs, "loss", "loss (nats per token)", label=False, alpha=0.35, linewidth=1
    )
    for number, run in enumerate(runs):
        drawn |= _held_out(axes, run, number, lambda values: values)
    _mark_growths(axes, runs)
    _mark_changes(axes, runs)
    return drawn


def losses_by_flops(axes: Any, runs: Sequence[Run]) -> bool:
    """Held-out loss against compute."""
    known = [(number, run) for number, run in enumerate(runs) if run.flops_per_token]
    drawn = False
    for number, run in known:
        drawn |= _held_out(axes, run, number, run.flops)
    axes.set_xlabel("training FLOPs, over all growths")
    axes.set_ylabel("held-out loss (nats per token)")
    _mark_growths(axes, [run for _, run in known], lambda run: run.flops([run.tokens_before])[0])
    _mark_changes(axes, [run for _, run in known], lambda run, tokens: run.flops([tokens])[0])
    return drawn


def _held_out(axes: Any, run: Run, number: int, place: Place) -> bool:
    tokens, losses = run.series("eval_loss")
    if not tokens:
        return False
    look = _look(number) | points(len(tokens))
    axes.plot(place(tokens), losses, label=line_label(run.name), **look)
    if run.loss_before_growth is not None:
        axes.plot(
            place([tokens[0], tokens[-1]]),
            [run.loss_before_growth] * 2,
            color=look["color"],
            linestyle=":",
            linewidth=1,
            label=line_label(f"{run.name}: before growth"),
        )
    return True


def learning_rates(axes: Any, runs: Sequence[Run]) -> bool:
    """The learning rate as it was set."""
    drawn = _plain(axes, runs, "learning_rate", "learning rate")
    axes.set_ylim(bottom=0)
    _mark_growths(axes, runs)
    _mark_changes(axes, runs)
    return drawn


def throughput(axes: Any, runs: Sequence[Run]) -> bool:
    """Tokens per second."""
    drawn = _plain(axes, runs, "tokens_per_second", "tokens per second")
    axes.set_ylim(bottom=0)
    _mark_growths(axes, runs)
    return drawn


def router_loss(axes: Any, runs: Sequence[Run]) -> bool:
    """The auxiliary loss of routers."""
    return _plain(axes, runs, "router_aux_loss", "auxiliary loss")


def _look(number: int, style: int | None = None) -> dict[str, Any]:
    """Colour of a run; lines that lie on each other are told apart by how they are dashed."""
    line = RUNS[number % len(RUNS)] if style is None else STYLES[style % len(STYLES)]
    return {"color": COLORS[number % len(COLORS)], "linestyle": line}


def _plain(
    axes: Any, runs: Sequence[Run], key: str, what: str, *, label: bool = True, **look: Any
) -> bool:
    """One line a run of what every line of its metrics has."""
    drawn = False
    for number, run in enumerate(runs):
        tokens, values = run.series(key)
        if tokens:
            shown = {**_look(number), **points(len(tokens)), **look}
            axes.plot(tokens, values, label=line_label(run.name) if label else None, **shown)
            drawn = True
    axes.set_xlabel("tokens, over all growths")
    axes.set_ylabel(what)
    return drawn


def _mark_growths(
    axes: Any, runs: Sequence[Run], place: Callable[[Run], float] = lambda run: run.tokens_before
) -> None:
    """A line where a run begins with a growth, its name above the plot; close ones share a name."""
    left, right = axes.get_xlim()
    named = -inf
    for where in sorted({place(run) for run in runs if run.grown}):
        axes.axvline(where, color=SOFT, linestyle="--", linewidth=1)
        if where - named > 0.12 * (right - left):
            axes.annotate(
                "growth", (where, 1), xycoords=("data", "axes fraction"), fontsize=8.5,
                xytext=(0, 3), textcoords="offset points", ha="center", color=SOFT,
            )  # fmt: skip
            named = where


def _mark_changes(
    axes: Any, runs: Sequence[Run], place: Callable[[Run, int], float] = lambda run, tokens: tokens
) -> None:
    """A dotted line where a run went on with other rates or data; beside it what changed."""
    for run in runs:
        for tokens, change in zip(*run.series("change"), strict=True):
            names = [key.rpartition(".")[2] for key in change]
            text = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if names[2:] else "")
            where = place(run, tokens)
            axes.axvline(where, color=SOFT, linestyle=":", linewidth=1)
            axes.annotate(
                f"change: {text or 'nothing'}", (where, 0), xycoords=("data", "axes fraction"),
                xytext=(2, 3), textcoords="offset points", rotation=90, color=SOFT, fontsize=8,
            )  # fmt: skip


def _lines(
    pairs: Sequence[tuple[str, str]], what: str, *, probe: bool = True, log: bool = False
) -> Draw:
    """Lines of (key, name); on a logarithmic scale without zeros (no such slots, no step yet)."""

    def draw(axes: Any, runs: Sequence[Run]) -> bool:
        drawn = False
        for number, run in enumerate(runs):
            for style, (key, name) in enumerate(pairs):
                line = list(zip(*run.series(key, probe=probe), strict=True))
                if log:
                    line = [(place, value) for place, value in line if value > 0]
                if line:
                    look = _look(number, style) | points(len(line), "os"[style % 2])
                    label = line_label(f"{run.name}: {name}")
                    axes.plot(*zip(*line, strict=True), label=label, **look)
                    drawn = True
        if drawn and log:
            axes.set_yscale("log")
        axes.set_xlabel("tokens, over all growths")
        axes.set_ylabel(what)
        return drawn

    return draw


def dead_heads(axes: Any, runs: Sequence[Run]) -> bool:
    """Dead new heads, as a part of all new heads."""
    drawn = False
    for number, run in enumerate(runs):
        tokens, dead = run.series("dead_new_heads", probe=True)
        _, all_ = run.series("new_heads", probe=True)
        if tokens:
            parts = [part / whole for part, whole in zip(dead, all_, strict=True)]
            label = line_label(f"{run.name} ({all_[-1]} new heads)")
            axes.plot(tokens, parts, label=label, **_look(number), **points(len(tokens)))
            drawn = True
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("tokens, over all growths")
    axes.set_ylabel("dead part of the new heads")
    return drawn


def expert_load(axes: Any, runs: Sequence[Run]) -> bool:
    """Use of the most and the least chosen expert of every layer."""
    parts = [("expert_load_max", "most used"), ("expert_load_min", "least used")]
    return _over_layers(axes, runs, parts, "choices of an expert / mean")


def lambdas(axes: Any, runs: Sequence[Run]) -> bool:
    """lambda over the layers."""
    return _over_layers(axes, runs, [("lambda", "")], "lambda")


def entropies(axes: Any, runs: Sequence[Run]) -> bool:
    """Attention entropy over the layers; of signal and noise heads where there are both."""
    both = any(run.series("noise_entropy", probe=True)[0] for run in runs)
    parts = [("signal_entropy", "signal heads" if both else ""), ("noise_entropy", "noise heads")]
    return _over_layers(axes, runs, parts, "entropy (nats)")


def _over_layers(
    axes: Any, runs: Sequence[Run], parts: Sequence[tuple[str, str]], what: str
) -> bool:
    """The mean over the layers as a line, and a band from the lowest layer to the highest."""
    drawn = False
    pale = min(0.15, 0.45 / (len(runs) * len(parts)))
    for number, run in enumerate(runs):
        for style, (key, name) in enumerate(parts):
            tokens, layers = run.series(key, probe=True)
            if not tokens or not all(layers):
                continue
            look = _look(number, style)
            low, high = [min(values) for values in layers], [max(values) for values in layers]
            label = line_label(run.name + (f": {name}" if name else ""))
            mean = [fmean(values) for values in layers]
            axes.plot(tokens, mean, label=label, **look, **points(len(tokens), "os"[style % 2]))
            axes.fill_between(tokens, low, high, color=look["color"], alpha=pale, linewidth=0)
            if len(tokens) == 1:  # a band of one point is none
                axes.vlines(tokens, low, high, color=look["color"], alpha=0.4)
            drawn = True
    axes.set_xlabel("tokens, over all growths")
    axes.set_ylabel(what)
    return drawn


# key, title, what a reader should know, how it is drawn, what has to be there
FIGURES: list[tuple[str, str, str, Draw, str]] = [
    (
        "loss-tokens", "Loss against tokens",
        "Held-out loss (dots), training loss (pale), the loss before a growth (dotted line).",
        losses_by_tokens, "held-out text",
    ),
    (
        "loss-flops", "Held-out loss against compute",
        "Three forward passes per token, counted over all growths from the first run named.",
        losses_by_flops, "held-out text and a known architecture",
    ),
    (
        "learning-rate", "Learning rate", "As the schedule set it.",
        learning_rates, "lines of training",
    ),
    (
        "throughput", "Throughput",
        "Tokens per second between two lines of the log, evaluations left out.",
        throughput, "lines of training",
    ),
    (
        "gradient-norms", "Gradient norms of old and new slots",
        "L2 norms before clipping.",
        _lines(
            [("grad_norm_old", "old slots"), ("grad_norm_new", "new slots")], "gradient norm",
            probe=False, log=True,
        ), "a grown model",
    ),
    (
        "update-norms", "Update norms of old and new slots",
        "L2 norm of what an optimizer step changed.",
        _lines(
            [("update_norm_old", "old slots"), ("update_norm_new", "new slots")], "update norm",
            log=True,
        ), "probes",
    ),
    (
        "similarity", "Similarity of copies over time",
        "1: a copy still is what it was copied from. Copies that stay at 1 learn nothing new.",
        _lines(
            [("head_similarity", "heads"), ("unit_similarity", "FFN units")],
            "mean cosine with the source",
        ), "probes of a model with copies",
    ),
    (
        "dead-heads", "Dead new heads",
        "New heads that add less than a thousandth of the median old head to the residual stream.",
        dead_heads, "probes of a model with new heads",
    ),
    (
        "lambda", "Lambda by layer",
        "Weight of the noise maps in differential attention: mean over the layers, band from the "
        "lowest layer to the highest.",
        lambdas, "differential attention",
    ),
    (
        "expert-load", "Load of experts by layer",
        "Choices of the most and of the least used expert over the mean: mean over the layers, "
        "band from the lowest layer to the highest.",
        expert_load, "probes of a model with experts",
    ),
    (
        "router-loss", "Auxiliary loss of routers",
        "Without its coefficient, in no other loss; experts per token where all are used equally.",
        router_loss, "training.router_aux_loss",
    ),
    (
        "entropy", "Attention entropy by layer",
        "Mean over held-out positions and layers, band from the lowest layer to the highest.",
        entropies, "probes",
    ),
]  # fmt: skip


def draw_figures(runs: Sequence[Run]) -> list[Figure]:
    """All figures; those without data say what they would need.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figures = []
    for key, title, caption, draw, needs in FIGURES:
        with canvas(key) as drawn:
            from matplotlib.ticker import EngFormatter

            axes = drawn.add_subplot()
            if not draw(axes, runs):
                figures.append(Figure(key, title, f"Not shown: it needs {needs}.", ""))
                continue
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.grid()
            legend_below(drawn)
            figures.append(finished(drawn, Figure(key, title, caption, "")))
    return figures
