"""A run that starts from a grown folder goes on with the optimizer state that grew with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from growkit.optimizer_state.load import load_into
from growkit.optimizer_state.store import FOLDER, INDEX, index_of, read_store
from growkit.progress import Reporter
from growkit.training.recipe import Recipe

SHOWN = 3


class GrownOptimizer(TrainerCallback):
    """Loads ``growkit_optimizer/`` of the run's checkpoint at its first step, never at a resume.

    The trainer calls it when the optimizer is prepared, so sharded parameters get their own part.
    Step counters go on (bias correction does not start again); the learning-rate schedule is the
    recipe's own and starts at its beginning, with the warm-up that it states.
    """

    def __init__(self, checkpoint: Path, reporter: Reporter, first_step: int = 0) -> None:
        self.folder, self.reporter = checkpoint / FOLDER, reporter
        self.first_step = first_step

    @classmethod
    def of(cls, recipe: Recipe, reporter: Reporter) -> list[GrownOptimizer]:
        """One, if the run's checkpoint holds optimizer state and the recipe does not reset it."""
        start = recipe.model.checkpoint
        wanted = recipe.model.optimizer_state == "auto"
        if start is None or not wanted or not (start / FOLDER / INDEX).is_file():
            return []
        return [cls(start, reporter, recipe.first_step)]

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **given: Any
    ) -> None:
        if state.global_step > self.first_step:
            return
        stored = read_store(self.folder)
        result = load_into(given["optimizer"], model, stored)
        count = len(result.loaded) + len(result.fresh)
        step = "" if stored.step is None else f" at step {stored.step:.0f}"
        text = (
            f"Optimizer state grown with the model: {len(result.loaded)} of {count} parameters go "
            f"on{step}"
        )
        if result.fresh:
            rest = len(result.fresh) - SHOWN
            names = ", ".join(result.fresh[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
            text += f"; begin anew: {names}"
        self.reporter.note(text + ".")
        estimates = sorted(
            role
            for role, entries in index_of(self.folder)["roles"].items()
            for entry in (entries if isinstance(entries, list) else [entries])
            if entry["moments"] == "estimate"
        )
        if estimates:
            roles = ", ".join(dict.fromkeys(estimates))
            self.reporter.note(f"Moments of {roles} are estimates; a short warm-up settles them.")
        if result.unused:
            self.reporter.warn(
                f"{len(result.unused)} parameters of the stored optimizer state are not in this "
                f"optimizer: {', '.join(result.unused[:SHOWN])}"
            )
