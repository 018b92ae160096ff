"""What a study keeps of a training run: figures out of its metrics, and of its trained model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growkit.training.metrics import last_evaluation
from growkit.training.recipe import Recipe

# Characters of each held-out document that the attention suite reads.
TEXT_OF_A_DOCUMENT = 50_000


def not_finite(rows: Sequence[dict[str, Any]]) -> str | None:
    """Why a run has no result although its training losses are numbers."""
    return next(
        (
            f"The held-out loss is {row['eval_loss']} at step {row['step']}."
            for row in rows
            if not math.isfinite(row.get("eval_loss", 0.0))
        ),
        None,
    )


def curve(rows: Sequence[dict[str, Any]], before: int) -> list[tuple[int, float]]:
    """(tokens of this run, held-out loss); tokens count through all runs in the rows."""
    return [
        (row["tokens"] - before, row["eval_loss"])
        for row in rows
        if math.isfinite(row.get("eval_loss", math.nan))
    ]


def training_seconds(rows: Sequence[dict[str, Any]], before: int) -> float:
    """Time of the training steps alone, over all attempts."""
    seconds, at = 0.0, before
    for row in rows:
        if "tokens_per_second" in row:
            seconds += (row["tokens"] - at) / max(row["tokens_per_second"], 1e-9)
            at = row["tokens"]
    return round(seconds, 2)


def series(
    rows: Sequence[dict[str, Any]], names: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """(tokens, value) of each probe; one with a value a layer is averaged over the layers."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name in names:
        points = [
            (float(row["tokens"]), _mean(row["probe"][name]))
            for row in rows
            if row.get("probe", {}).get(name) is not None
        ]
        finite = [point for point in points if math.isfinite(point[1])]
        if finite:
            found[name] = finite
    return found


def _mean(value: Any) -> float:
    return sum(map(float, value)) / max(len(value), 1) if isinstance(value, list) else float(value)


def measures(
    model: Path, recipe: Recipe, rows: Sequence[dict[str, Any]], asked: Sequence[str]
) -> dict[str, float]:
    """Figures of the trained model besides its loss, ``loss.NAME`` of each source among them."""
    last = last_evaluation(rows) or {}
    by_source = {key: last[key] for key in last if key.startswith("eval_loss/")}
    found = {
        name: float(last[name])
        for name in ("perplexity", "bits_per_byte")
        if last.get(name) is not None
    }
    found |= {key.replace("eval_loss/", "loss."): float(by_source[key]) for key in by_source}
    if "attention" in asked:
        from growkit.evaluation import attention_suite
        from growkit.evaluation.model import load

        found |= attention_suite(load(model), text=held_out_text(recipe)).figures()
    return {name: value for name, value in found.items() if math.isfinite(value)}


def held_out_text(recipe: Recipe) -> str:
    """The beginnings of all held-out documents: what the model was not trained on."""
    from growkit.data.sources import corpus_of

    documents = corpus_of(recipe.data).eval_documents()
    return "\n\n".join(text[:TEXT_OF_A_DOCUMENT] for text in documents)
