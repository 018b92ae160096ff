"""What may differ between a run and its continuation, and what the other changes have to do.

* ``MAY_CHANGE``: names, places and intervals; nothing that is computed.
* ``SAME_SAMPLES``, and another split of a step into micro-batches: the samples of every step and
  the function are the same, so the losses are equal up to rounding.
* The length of a run, and the keys of its schedule, as long as the steps that were taken would have
  had the same rates, and the next one does not jump.
* ``RATE`` and the data: a change point, ``--resume CHECKPOINT --out NEW``.

Everything else would be another run. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growkit.core.errors import CheckpointError, UsageError
from growkit.core.progress import Reporter
from growkit.core.yaml_files import read_yaml
from growkit.training import checkpoints
from growkit.training.parallel.launch import train_command
from growkit.training.read_recipe import make_recipe
from growkit.training.recipe import Recipe
from growkit.training.recipe_training import EvalTasksSection
from growkit.training.schedule import cycles, learning_rate_factor

MAY_CHANGE = {
    "out",
    "data.cache_dir",
    "data.workers",
    "training.max_steps",
    "training.max_tokens",
    "training.logging_steps",
    "training.eval_steps",
    "training.probe_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.report_to",
    "training.samples.prompts",
    "training.samples.max_new_tokens",
    *(f"training.eval_tasks.{key}" for key in EvalTasksSection.model_fields),
    "training.early_stopping.patience",
    "training.early_stopping.threshold",
    "training.callbacks",
    "training.peak_flops_per_second",
    "training.per_device_eval_batch_size",
    "training.dataloader_num_workers",
    "parallel.processes",
    "parallel.timeout_minutes",
    "position.end_step",
}
SAME_SAMPLES = {
    "model.attn_implementation",
    "training.gradient_checkpointing",
    "training.torch_compile",
    "training.use_cpu",
    "training.full_determinism",
    "parallel.gather_dtype",
    "parallel.context",
}
SPLIT = {"training.per_device_train_batch_size", "training.gradient_accumulation_steps"}
LENGTH = {"training.max_steps", "training.max_tokens"}
SCHEDULE = {
    "training.schedule",
    "training.warmup_steps",
    "training.decay_steps",
    "training.decay_type",
    "training.restarts",
    "training.restart_warmup_steps",
    "training.min_learning_rate_ratio",
}
# What a change point may change besides: rates, schedule, what is read from there on.
CHANGE_POINT = re.compile(
    "|".join([*map(re.escape, sorted(SCHEDULE))])
    + r"|training\.(learning_rate|weight_decay|adam_\w+|muon_\w+|max_grad_norm|router_aux_loss"
    r"|(new|old|lambda)_learning_rate_multiplier|(new|old)_warmup_steps|bf16|save_dtype"
    r"|average_checkpoints)|data\.(max_eval_tokens|files|tokens|mixture|dataset\.\w+)"
)
BEGIN_ANEW = "Begin anew with --overwrite, or put the file back."


@dataclass(frozen=True)
class Changes:
    """Two recipes, key by key.

    Attributes:
        old: the recipe that a run was stored with; None where this version cannot read it.
        values: dotted key -> (before, after) of the keys that differ.
    """

    old: Recipe | None
    new: Recipe
    values: dict[str, tuple[Any, Any]]

    @classmethod
    def since(cls, stored: Path, recipe: Recipe) -> Changes:
        """What changed since a run stored its recipe.

        Raises:
            CheckpointError: the file is damaged.
        """
        content = read_yaml(stored, error=CheckpointError, remedy=BEGIN_ANEW)
        if not isinstance(content, dict):
            raise CheckpointError(f"{str(stored)!r} holds no recipe.", BEGIN_ANEW)
        before = None
        with suppress(UsageError):  # of another version: compared as it is
            before = make_recipe(content)
            content = before.to_dict()  # with keys that did not exist when it was stored
        old, new = _flat(content), _flat(recipe.to_dict())
        differ = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return cls(before, recipe, {key: (old.get(key), new.get(key)) for key in differ})

    @property
    def same_samples(self) -> set[str]:
        """The changed keys that leave samples and function as they are."""
        same = set(SAME_SAMPLES)
        if self.old is not None and self.old.sequences_per_step == self.new.sequences_per_step:
            same |= SPLIT
        if self.old is not None and self.old.parallel.sharded and self.new.parallel.sharded:
            same |= {"parallel.tensor", "parallel.strategy"}  # their checkpoints are the same
        return same & self.values.keys()

    def in_words(self, keys: Collection[str]) -> str:
        """``training.learning_rate 0.01 -> 0.005, ...``."""
        return ", ".join(
            f"{key} {_value(old)} -> {_value(new)}"
            for key, (old, new) in self.values.items()
            if key in keys
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        return {k: v for key in values for k, v in _flat(values[key], f"{prefix}{key}.").items()}
    return {prefix[:-1]: values}


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "absent" if value is None else str(value)


def check_same(
    recipe: Recipe, stored: Path, resume: str, reporter: Reporter, *, begin: int = 0
) -> None:
    """Refuse to continue the run that stored a recipe with one that would make another run of it.

    Args:
        stored: ``OUT/training/recipe.yaml``.
        resume: ``auto``, or the checkpoint to continue from.
        begin: the step of its change point, where it has no checkpoint of its own yet.

    Raises:
        UsageError: naming the key, and the command that does what was asked for.
    """
    changes = Changes.since(stored, recipe)
    folder = stored.parent / "checkpoints"
    step = _resumed_step(folder, resume) or begin
    allowed = MAY_CHANGE | changes.same_samples
    schedule = SCHEDULE & changes.values.keys()
    # The stages of a run have checkpoints of their own.
    if schedule and changes.old and not recipe.stages and _same_rates(changes.old, recipe, step):
        allowed |= schedule
    forbidden = [key for key in changes.values if key not in allowed]
    if forbidden:
        key = forbidden[0]
        old, new = changes.values[key]
        raise UsageError(
            f"{str(stored.parent.parent)!r} holds a run of another recipe: {key} was "
            f"{old!r} and is {new!r}"
            + (f" (and {len(forbidden) - 1} more)." if forbidden[1:] else "."),
            _other_ways(forbidden, recipe, folder, step),
        )
    if LENGTH & changes.values.keys():
        _check_length(changes, folder, step, reporter)
    if changes.same_samples:
        reporter.note(
            f"Changed since the run began: {changes.in_words(changes.same_samples)}; the samples "
            "are the same, and losses are equal up to rounding."
        )


def _other_ways(forbidden: list[str], recipe: Recipe, folder: Path, step: int) -> str:
    anew = "Choose another --out, or begin anew with --overwrite."
    checkpoint, out = folder / f"checkpoint-{step}", folder.parent.parent
    if not checkpoint.is_dir() or recipe.stages or recipe.position is not None:
        return anew
    if all(CHANGE_POINT.fullmatch(key) for key in forbidden):
        command = train_command(out.with_name(f"{out.name}-from-{step}"), resume=checkpoint)
        return f"Go on from there with the change, in a folder of its own: {command}"
    command = weights_command(recipe, checkpoint, out.with_name(f"{out.name}-from-{step}"))
    return f"{anew} To start from its weights: {command}"


def weights_command(recipe: Recipe, checkpoint: Path, out: Path) -> str:
    """The command that trains a checkpoint's weights as a run of its own."""
    config = {"model.config": "null"} if recipe.model.config is not None else {}
    return train_command(out, values={**config, "model.checkpoint": checkpoint})


def _resumed_step(folder: Path, resume: str) -> int:
    """The step that a run would continue from, 0 without a checkpoint."""
    if resume == "auto":
        newest = checkpoints.newest_whole(folder, contents=False)[0]
        return 0 if newest is None else checkpoints.step_of(newest)
    return max(checkpoints.step_of(Path(resume).resolve()), 0)


def _same_rates(old: Recipe, new: Recipe, steps: int) -> bool:
    """The steps that were taken would have had the same rates."""
    before, after = learning_rate_factor(old), learning_rate_factor(new)
    return all(before(step) == after(step) for step in range(steps - new.first_step))


# -- another length ------------------------------------------------------------------------------


def _check_length(changes: Changes, folder: Path, step: int, reporter: Reporter) -> None:
    """Another length must change neither the samples so far nor, upwards, the next step's rate."""
    recipe, old = changes.new, changes.old
    if any(len(set(source.weights)) > 1 for source in recipe.data.sources):
        raise UsageError(
            "The length of the run changed, and the weights of its mixture change over it: "
            "the samples so far would have been others.",
            "Keep the length, or begin anew with --overwrite.",
        )
    if recipe.training.schedule == "cosine":
        reporter.warn(
            "the length of a cosine schedule changed: the learning rate jumps to the new curve"
        )
    if old is not None and recipe.first_step < step < recipe.total_steps:
        _check_rate(changes, old, folder, step)


def _check_rate(changes: Changes, old: Recipe, folder: Path, step: int) -> None:
    recipe = changes.new
    last = learning_rate_factor(old)(step - 1 - recipe.first_step)
    following = learning_rate_factor(recipe)(step - recipe.first_step)
    decaying = _decaying_from(old, step - 1)
    restarted = step in [recipe.steps(restart) for restart in recipe.training.restarts]
    if decaying is None or restarted or following <= last:
        return
    where = "behind the end" if step >= old.total_steps else "in the decay"
    peak = recipe.training.learning_rate
    ways = [_before_the_decay(folder, decaying, old), _restart(changes, folder, step)]
    raise UsageError(
        f"checkpoint-{step} lies {where} of its schedule ({old.training.schedule}, decay from step "
        f"{decaying} to {old.total_steps}): with {recipe.total_steps} steps the learning rate "
        f"would jump from {last * peak:.3g} to {following * peak:.3g}.",
        " ".join(way for way in ways if way),
    )


def _decaying_from(old: Recipe, step: int) -> int | None:
    """Where the decay began that the rate of a step belongs to; None where it is none.

    Of a cosine, the whole curve is one: only its end counts.
    """
    if old.training.schedule == "cosine":
        return old.steps(old.training.warmup_steps) if step + 1 >= old.total_steps else None
    if old.training.schedule != "wsd":
        return None
    for first, end, _, decay in cycles(old):
        if first <= step < end:
            return end - decay if step > end - decay else None
    return None


def _before_the_decay(folder: Path, decaying: int, old: Recipe) -> str:
    """The first way: the last checkpoint whose steps all had the undecayed rate."""
    if old.training.schedule != "wsd":
        return ""
    for checkpoint in reversed(checkpoints.list_checkpoints(folder)):
        whole = checkpoints.damage(checkpoint, contents=False) is None
        if checkpoints.step_of(checkpoint) <= decaying + 1 and whole:
            command = train_command(folder.parent.parent, resume=checkpoint)
            return f"Go on from the last checkpoint before the decay: {command}."
    return (
        "No checkpoint from before the decay is kept (training.save_total_limit: "
        f"{old.training.save_total_limit})."
    )


def _restart(changes: Changes, folder: Path, step: int) -> str:
    """The second way: the decay ends as it would have, and the rate rises to the peak again."""
    old, out = changes.old, folder.parent.parent
    assert old is not None
    before, end = old.training, old.total_steps
    room = changes.new.total_steps - end
    warmup = old.steps(before.warmup_steps)
    wsd = before.schedule == "wsd"
    decay = old.steps(before.decay_steps) if wsd else min(room // 2, end - warmup)
    rise = max(1, min(warmup or decay // 2, room - decay))
    if room < decay + rise:
        return (
            f"Or restart the schedule at step {end} (training.restarts, training."
            f"restart_warmup_steps): with a decay of {decay} steps it takes {decay + rise} steps "
            f"more, not {room}."
        )
    values: dict[str, Any] = {} if wsd else {"training.schedule": "wsd"}
    # Fractions are of the new length: the past keeps its steps.
    if not wsd or before.decay_steps < 1:
        values["training.decay_steps"] = decay
    if 0 < before.warmup_steps < 1:
        values["training.warmup_steps"] = warmup
    values["training.restarts"] = [*(old.steps(value) for value in before.restarts), end]
    values["training.restart_warmup_steps"] = rise
    if wsd:
        return f"Or restart it behind its decay: {train_command(out, values=values)}"
    checkpoint = folder / f"checkpoint-{step}"
    command = train_command(Path("NEW"), resume=checkpoint, values=values)
    return f"Restart it as a change point: {command}"
