"""What a run knows of the growth that its checkpoint came from: growkit.json's new-parameter map.

No torch here. growkit.json goes along with every trained folder, so a run that continues a trained
one has the same map: new are the slots of the last growth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from growkit.core.errors import UsageError
from growkit.record.manifest import MANIFEST, read_manifest, trained_tokens

if TYPE_CHECKING:
    from growkit.training.recipe import Recipe
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback

from growkit.core.errors import CheckpointError
from growkit.core.progress import Reporter
from growkit.optimizer_state.find import last_of_run, state_beside
from growkit.optimizer_state.load import load_into
from growkit.optimizer_state.store import FOLDER, INDEX, index_of
from growkit.record.manifest import TRAINING_RECORD, read_training_record
from growkit.training.recipe import Recipe


def new_parameters_of(recipe: Recipe) -> dict[str, Any]:
    """The new-parameter map of the run's source; empty where it was not grown.

    Raises:
        UsageError: the recipe treats new slots differently, and nothing says which those are.
    """
    source = recipe.model.checkpoint
    found: dict[str, Any] = {}
    if source is not None:
        found = (read_manifest(source) or {}).get("new_parameters") or {}
    if not found and recipe.training.uses_new_parameter_map:
        where = "a model from scratch" if source is None else repr(str(source))
        reason = (
            "has no new parameters"
            if source is None or (source / MANIFEST).is_file()
            else f"has no {MANIFEST}, which lists its new parameters"
        )
        raise UsageError(
            f"The recipe trains new and old slots differently, and {where} {reason}.",
            "Start from a folder that growkit grow wrote (or a run that continued one), or set "
            "training.train: all without multipliers and warm-ups of new or old slots.",
        )
    return found


def tokens_with_source(recipe: Recipe, tokens: int) -> int | None:
    """Tokens of a run and of all training before it; None where that is not known."""
    source = recipe.model.checkpoint
    if source is None:
        return tokens
    before = recipe.model.trained_tokens
    before = trained_tokens(source) if before is None else before
    return None if before is None else before + tokens


def loss_before_growth(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> float | None:
    """Held-out loss of the parent in nats per token; None where the source is not freshly grown.

    A run of the parent beside the source that was measured on the same data section says it.
    Otherwise growth that keeps the function says it too: then it is the loss at the first step.

    Args:
        rows: the metrics of this run so far.
    """
    source = recipe.model.checkpoint
    manifest = read_manifest(source) if source is not None else None
    if source is None or manifest is None or (source / TRAINING_RECORD).exists():
        return None
    recorded = _recorded(
        source.resolve().parent / str((manifest.get("parent") or {}).get("name")), recipe
    )
    if recorded is not None:
        return recorded
    if (manifest.get("plan") or {}).get("exactness") == "not-exact":
        return None
    first = (row for row in rows if "eval_loss" in row and row["step"] == recipe.first_step)
    return next((row["eval_loss"] for row in first), None)


def _recorded(parent: Path, recipe: Recipe) -> float | None:
    try:
        record = read_training_record(parent) or {}
    except CheckpointError:
        return None
    before, data = ((record.get("recipe") or {}).get("data") or {}), recipe.to_dict()["data"]
    same = before | {"start": None} == data | {"start": None}
    loss = record.get("eval_loss")
    return float(loss) if same and loss is not None else None


SHOWN = 3


class GrownOptimizer(TrainerCallback):
    """Loads the optimizer state beside the run's weights at its first step, never at a resume.

    That is ``growkit_optimizer/``, or what Trainer, accelerate or a distributed checkpoint left
    there. What cannot be used is left out, and said.

    The trainer calls it when the optimizer is prepared, so sharded parameters get their own part.
    Step counters continue (bias correction does not start again); the learning-rate schedule is the
    recipe's own and starts at its beginning, with the warm-up that it states.
    """

    def __init__(self, checkpoint: Path, reporter: Reporter, first_step: int = 0) -> None:
        self.checkpoint, self.reporter = checkpoint, reporter
        self.first_step = first_step

    @classmethod
    def of(cls, recipe: Recipe, reporter: Reporter) -> list[GrownOptimizer]:
        """One, if the run starts from a folder and the recipe does not reset the optimizer."""
        start = recipe.model.checkpoint
        if start is None or recipe.model.optimizer_state == "reset":
            return []
        return [cls(start, reporter, recipe.first_step)]

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **given: Any
    ) -> None:
        if state.global_step > self.first_step:
            return
        grown = (self.checkpoint / FOLDER / INDEX).is_file()
        try:
            stored = state_beside(self.checkpoint)
            if stored is None:
                self._say_what_the_run_has()
                return
            result = load_into(given["optimizer"], model, stored)
        except CheckpointError as error:
            if grown:
                raise
            self.reporter.warn(
                f"the optimizer begins anew, without the state beside the weights: {error.cause}"
            )
            return
        count = len(result.loaded) + len(result.fresh)
        step = "" if stored.step is None else f" at step {stored.step:.0f}"
        where = "grown with the model" if grown else f"beside the weights ({stored.path.name})"
        text = f"Optimizer state {where}: {len(result.loaded)} of {count} parameters continue{step}"
        if result.fresh:
            rest = len(result.fresh) - SHOWN
            names = ", ".join(result.fresh[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
            text += f"; begin anew: {names}"
        self.reporter.note(text + ".")
        if grown:
            self._say_estimates()
        if result.unused:
            self.reporter.warn(
                f"{len(result.unused)} parameters of the stored optimizer state are not in this "
                f"optimizer: {', '.join(result.unused[:SHOWN])}"
            )

    def _say_what_the_run_has(self) -> None:
        last = last_of_run(self.checkpoint)
        if last is not None:
            self.reporter.note(
                f"The optimizer begins anew; to go on with the state of the run in "
                f"{self.checkpoint}, set model.checkpoint: {last}."
            )

    def _say_estimates(self) -> None:
        estimates = sorted(
            role
            for role, entries in index_of(self.checkpoint / FOLDER)["roles"].items()
            for entry in (entries if isinstance(entries, list) else [entries])
            if entry["moments"] == "estimate"
        )
        if estimates:
            roles = ", ".join(dict.fromkeys(estimates))
            self.reporter.note(f"Moments of {roles} are estimates; a short warm-up settles them.")
