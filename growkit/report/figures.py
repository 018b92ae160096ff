"""The figures of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from growkit.report.canvas import Figure, canvas, finished
from growkit.report.runs import Run

Draw = Callable[[Any, Sequence[Run]], bool]


def losses_by_tokens(axes: Any, runs: Sequence[Run]) -> bool:
    """Training (pale) and held-out loss."""
    drawn = False
    for number, run in enumerate(runs):
        tokens, losses = run.series("loss")
        if tokens:
            axes.plot(tokens, losses, color=f"C{number}", alpha=0.3, linewidth=1)
        drawn |= _held_out(axes, run, number, lambda values: values)
    axes.set_xlabel("tokens, over all growths")
    axes.set_ylabel("loss (nats a token)")
    _mark_growths(axes, runs, lambda values: values)
    return drawn


def losses_by_flops(axes: Any, runs: Sequence[Run]) -> bool:
    """Held-out loss against compute."""
    known = [(number, run) for number, run in enumerate(runs) if run.flops_per_token]
    drawn = False
    for number, run in known:
        drawn |= _held_out(axes, run, number, run.flops)
    axes.set_xlabel("training FLOPs, over all growths")
    axes.set_ylabel("held-out loss (nats a token)")
    for _, run in known:
        _mark_growths(axes, [run], run.flops)
    return drawn


def _held_out(axes: Any, run: Run, number: int, place: Callable[[list[int]], Any]) -> bool:
    tokens, losses = run.series("eval_loss")
    if not tokens:
        return False
    style = ("-", "-", "--", ":")[number % 4]
    axes.plot(place(tokens), losses, f"{style}o", color=f"C{number}", markersize=3, label=run.name)
    if run.loss_before_growth is not None:
        axes.plot(
            place([tokens[0], tokens[-1]]),
            [run.loss_before_growth] * 2,
            color=f"C{number}",
            linestyle=":",
            linewidth=1,
            label=f"{run.name}: before growth",
        )
    return True


def _mark_growths(axes: Any, runs: Sequence[Run], place: Callable[[list[int]], Any]) -> None:
    places = {place([run.tokens_before])[0] for run in runs if run.grown}
    for where in sorted(places):
        axes.axvline(where, color="0.4", linestyle="--", linewidth=1)
        axes.annotate(
            "growth", (where, 1), xycoords=("data", "axes fraction"), rotation=90, fontsize=8,
            xytext=(3, -4), textcoords="offset points", va="top", color="0.4",
        )  # fmt: skip


def _old_and_new(key: str, what: str, *, probe: bool) -> Draw:
    def draw(axes: Any, runs: Sequence[Run]) -> bool:
        drawn = False
        for number, run in enumerate(runs):
            for part, style in (("old", "-"), ("new", "--")):
                tokens, values = run.series(f"{key}_{part}", probe=probe)
                if tokens and any(values):
                    label = f"{run.name}: {part} slots"
                    axes.plot(tokens, values, style, color=f"C{number}", label=label)
                    drawn = True
        if drawn:
            axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_ylabel(what)
        return drawn

    return draw


def _fractions(pairs: Sequence[tuple[str, str]], what: str) -> Draw:
    """Lines of probe keys with values up to 1."""

    def draw(axes: Any, runs: Sequence[Run]) -> bool:
        drawn = False
        for number, run in enumerate(runs):
            for (key, label), style in zip(pairs, ("-o", "--s"), strict=False):
                tokens, values = run.series(key, probe=True)
                if tokens:
                    label_of_run = f"{run.name}: {label}"
                    axes.plot(
                        tokens, values, style, color=f"C{number}", markersize=3, label=label_of_run
                    )
                    drawn = True
        axes.set_xlabel("tokens")
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
            label = f"{run.name} ({all_[-1]} new heads)"
            axes.plot(tokens, parts, "-o", color=f"C{number}", markersize=3, label=label)
            drawn = True
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("tokens")
    axes.set_ylabel("dead part of the new heads")
    return drawn


def router_loss(axes: Any, runs: Sequence[Run]) -> bool:
    """The auxiliary loss of routers."""
    drawn = False
    for number, run in enumerate(runs):
        tokens, values = run.series("router_aux_loss")
        if tokens:
            axes.plot(tokens, values, color=f"C{number}", linewidth=1, label=run.name)
            drawn = True
    axes.set_xlabel("tokens")
    axes.set_ylabel("router_aux_loss")
    return drawn


def expert_load(axes: Any, runs: Sequence[Run]) -> bool:
    """Use of the most and the least chosen expert of every layer."""
    parts = [
        ("expert_load_max", "Reds", "most used, "),
        ("expert_load_min", "Blues", "least used, "),
    ]
    return _layers(axes, runs, parts, "choices of an expert / mean")


def lambdas(axes: Any, runs: Sequence[Run]) -> bool:
    """lambda of every layer, dark for the first and light for the last."""
    return _layers(axes, runs, [("lambda", "viridis", "")], "lambda")


def entropies(axes: Any, runs: Sequence[Run]) -> bool:
    """Attention entropy of every layer, signal blue and noise red."""
    parts = [("signal_entropy", "Blues", "signal, "), ("noise_entropy", "Reds", "noise, ")]
    return _layers(axes, runs, parts, "entropy (nats)")


def _layers(
    axes: Any, runs: Sequence[Run], parts: Sequence[tuple[str, str, str]], what: str
) -> bool:
    from matplotlib import colormaps

    drawn = False
    for number, run in enumerate(runs):
        for key, colors, label in parts:
            tokens, values = run.series(key, probe=True)
            for layer in range(len(values[0]) if values else 0):
                depth = layer / max(len(values[0]) - 1, 1)
                ends = layer in (0, len(values[0]) - 1)
                axes.plot(
                    tokens,
                    [value[layer] for value in values],
                    (".-", ".--", ".:")[number % 3],
                    color=colormaps[colors](0.35 + 0.5 * depth),
                    linewidth=1.2,
                    label=f"{run.name}: {label}layer {layer}" if ends else None,
                )
                drawn = True
    axes.set_xlabel("tokens")
    axes.set_ylabel(what)
    return drawn


SIMILARITY = _fractions(
    [("head_similarity", "heads"), ("unit_similarity", "FFN units")], "mean cosine with the source"
)
# key, title, what a reader should know, how it is drawn, what has to be there
FIGURES: list[tuple[str, str, str, Draw, str]] = [
    (
        "loss-tokens", "Loss against tokens",
        "Held-out loss (dots), training loss (pale), the loss before a growth (dotted line).",
        losses_by_tokens, "held-out text",
    ),
    (
        "loss-flops", "Held-out loss against compute",
        "Three forward passes a token, counted over all growths from the first run named.",
        losses_by_flops, "held-out text and a known architecture",
    ),
    (
        "gradient-norms", "Gradient norms of old and new slots",
        "L2 norms before clipping.",
        _old_and_new("grad_norm", "gradient norm", probe=False), "a grown model",
    ),
    (
        "update-norms", "Update norms of old and new slots",
        "L2 norm of what an optimizer step changed.",
        _old_and_new("update_norm", "update norm", probe=True), "probes",
    ),
    (
        "similarity", "Similarity of copies over time",
        "1: a copy still is what it was copied from. Copies that stay at 1 learn nothing new.",
        SIMILARITY, "probes of a model with copies",
    ),
    (
        "dead-heads", "Dead new heads",
        "New heads that add less than a thousandth of the median old head to the residual stream.",
        dead_heads, "probes of a model with new heads",
    ),
    (
        "lambda", "Lambda by layer",
        "Weight of the noise maps in differential attention; dark: first layers.",
        lambdas, "differential attention",
    ),
    (
        "expert-load", "Load of experts by layer",
        "Choices of the most (red) and least used (blue) expert over the mean; pale: first layers.",
        expert_load, "probes of a model with experts",
    ),
    (
        "router-loss", "Auxiliary loss of routers",
        "Without its coefficient, in no other loss; experts per token where all are used equally.",
        router_loss, "training.router_aux_loss",
    ),
    (
        "entropy", "Attention entropy by layer",
        "Mean over held-out positions; blue: signal heads, red: noise heads; pale: first layers.",
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
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=7)
            figures.append(finished(drawn, Figure(key, title, caption, "")))
    return figures
