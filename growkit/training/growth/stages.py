"""A run with growths: train, grow, train on, as one command that continues wherever it was killed.

What it leaves in OUT, beside the final model as any run leaves it::

    training/
      recipe.yaml, metrics.jsonl, loss.png     of the whole run
      stages/0/          the run of stage 0 (see growkit.training.run), and stop.json
      stages/1-grown/    its last checkpoint grown, verified; with the optimizer state
      stages/1/          the run of stage 1, which starts there; and so on
    grow-now             make this file to grow now (``growkit train ... --grow-now`` does)

There is no other state: every part appears under its name when it is whole, and what is missing is
made next. Steps and tokens count through all stages, so the sample order (a pure function of the
step), the schedule and the mixture continue over a growth, and no sample is read twice for it.

Under torchrun every process runs the stages; the first one decides from what is on disk, grows (a
streamed pass over files) and publishes. The others wait, without a limit but the first one's life,
then look at the grown folder themselves and read their part of it.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from growkit.checkpoint import identity, open_checkpoint
from growkit.core.errors import GrowkitError, UsageError
from growkit.core.names import METRICS, README, TRAINING_RECORD
from growkit.core.progress import Reporter, Silent
from growkit.families import family_of
from growkit.growing import grow_checkpoint
from growkit.record.card import training_card
from growkit.record.manifest import read_manifest
from growkit.surgery.effect import Exactness
from growkit.training.growth.grown import tokens_with_source
from growkit.training.growth.rehearsal import first_config, rehearse
from growkit.training.growth.stage_end import (
    GROW_NOW,
    STOP,
    TAKEN,
    NoJump,
    PlateauEnd,
    StageEnd,
    read_stop,
)
from growkit.training.growth.stage_metrics import (
    grown_folder,
    plot,
    record_of,
    stage_folder,
    write_merged,
)
from growkit.training.leftovers import remove
from growkit.training.metrics import read_metrics
from growkit.training.parallel.launch import check_launch
from growkit.training.parallel.processes import Processes, join
from growkit.training.published import move_into, published
from growkit.training.read_recipe import make_recipe
from growkit.training.recipe import Recipe
from growkit.training.recipe_checks import training_of
from growkit.training.recipe_stages import Position
from growkit.training.run_folder import open_run
from growkit.training.run_result import TrainingResult, make_result
from growkit.training.storage import says_what_is_kept

# What rounding may change in a held-out loss (nats per token), by the dtype that is computed in.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
TrainOne = Callable[..., TrainingResult]


def train_stages(
    recipe: Recipe,
    out: Path,
    train_one: TrainOne,
    *,
    resume: str,
    overwrite: bool,
    reporter: Reporter,
) -> TrainingResult:
    """Run a recipe with stages, or continue with it.

    Args:
        train_one: :func:`growkit.training.run.train`.

    Raises:
        UsageError: the recipe and ``out`` do not go together, or a growth could not be done: it is
            rehearsed on paper before the first step.
        VerificationFailed: a grown folder does not compute what it should; nothing of it stays, and
            the same command tries again.
    """
    started = time.monotonic()
    count = check_launch(recipe)
    if resume not in ("auto", "never"):
        raise UsageError(
            f"--resume {resume!r} with a recipe of stages.",
            "Use auto: the run continues where it was.",
        )
    rehearse(recipe)
    folder = out / "training"
    with ExitStack() as stack:
        stack.enter_context(says_what_is_kept(folder))
        processes = join(recipe, count)
        reporter = reporter if processes.first else Silent()
        opened = open_run(recipe, out, folder, resume, overwrite, reporter)
        processes.from_first(lambda: stack.enter_context(opened))
        run = _StagedRun(recipe, out, train_one, processes, reporter)
        record = run.run()
        processes.from_first(
            lambda: plot(folder, run.stages, len(recipe.stages), out.name, reporter)
        )
        return make_result(record, out, folder, started, None)


class _StagedRun:
    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        train_one: TrainOne,
        processes: Processes,
        reporter: Reporter,
    ) -> None:
        self.recipe, self.out, self.reporter = recipe, out, reporter
        self.train_one, self.processes = train_one, processes
        self.folder = out / "training"
        self.stages = self.folder / "stages"

    def run(self) -> dict[str, Any]:
        """All stages; the record of the run."""
        self.processes.from_first(lambda: self.stages.mkdir(exist_ok=True))
        last = 0
        for stage in range(len(self.recipe.stages) + 1):
            if stage:
                self._grow(stage)
            record = self._train(stage)
            last = stage
            self.processes.from_first(self._merge_metrics)
            if record["steps"] >= self.recipe.total_steps:
                break
        if last < len(self.recipe.stages):
            self.reporter.warn(
                f"the run ended before growth {last + 1}: its trigger was never reached"
            )
        return self.processes.from_first(lambda: self._publish(last, record))

    # -- one stage ------------------------------------------------------------------------------

    def _stage(self, stage: int) -> Path:
        return stage_folder(self.stages, stage)

    def _grown(self, stage: int) -> Path:
        return grown_folder(self.stages, stage)

    def _record(self, stage: int) -> dict[str, Any] | None:
        return record_of(self.stages, stage)

    def _last_checkpoint(self, stage: int) -> Path:
        record = self._record(stage)
        assert record is not None
        return self._stage(stage) / "training" / "checkpoints" / f"checkpoint-{record['steps']}"

    def _train(self, stage: int) -> dict[str, Any]:
        done, first, end, loss = self.processes.from_first(lambda: self._where_to_begin(stage))
        if done is not None:
            return done
        self.reporter.note(f"Stage {stage}: steps {first} to {end}.")
        one = self._stage_recipe(stage, first, end)
        callbacks = self._callbacks(stage, first, loss)
        self.train_one(one, self._stage(stage), reporter=self.reporter, callbacks=callbacks)
        del callbacks
        gc.collect()  # the trainer, its model and optimizer refer to each other
        record = self.processes.from_first(lambda: self._record(stage))
        assert record is not None
        return record

    def _where_to_begin(self, stage: int) -> tuple[dict[str, Any] | None, int, int, float | None]:
        """Of a stage: its record where it is done, first and last step, the loss before it."""
        recipe, end, first, loss = self.recipe, self.recipe.total_steps, 0, None
        if stage < len(recipe.stages):
            end = recipe.stages[stage].at.step(recipe.tokens_per_step) or end
            end = read_stop(self._stage(stage)) or end
        if stage:
            before = self._record(stage - 1)
            assert before is not None
            first, loss = before["steps"], before["eval_loss"]
        record = self._record(stage)
        done = record is not None and (record["steps"] >= end or self._grown(stage + 1).is_dir())
        return record if done else None, first, end, loss

    def _stage_recipe(self, stage: int, first: int, end: int) -> Recipe:
        values = self.recipe.to_dict()
        for key in ("stages", "out"):
            values.pop(key, None)
        training = training_of(self.recipe, stage)
        values["training"] = training.model_dump(mode="json", exclude_none=True)
        if training.rate_rule != "standard" and training.rate_base is None:
            values["training"]["rate_base"] = self._first_fields()
        values["data"]["cache_dir"] = str(self.recipe.data.cache_dir or self.folder / "data")
        warmup = self.recipe.stages[stage - 1].warmup_steps if stage else 0
        position = Position(stage=stage, first_step=first, end_step=end, warmup_steps=warmup)
        values["position"] = position.model_dump()
        if stage:
            values["model"] = {
                key: value for key, value in values["model"].items() if key != "config"
            } | {"checkpoint": str(self._grown(stage))}
            tokens = tokens_with_source(self.recipe, first * self.recipe.tokens_per_step)
            values["model"]["trained_tokens"] = tokens
            own = self._stage(0) / "training" / "tokenizer"
            if own.is_dir():
                values["tokenizer"] = {"path": str(own)}
        return make_recipe(values, f"stage {stage}")

    def _first_fields(self) -> dict[str, Any]:
        """The sizes of the model that the run starts from, as its config states them."""
        config = first_config(self.recipe)
        family = family_of(config)
        fields = family.config_fields(family.sizes(config))
        return {name: value for name, value in fields.items() if isinstance(value, int)}

    def _callbacks(
        self, stage: int, first: int, before: float | None
    ) -> tuple[list[Any], list[Any]]:
        """Callbacks before and after the one that writes metrics; ``before``: a growth's loss."""
        ahead: list[Any] = []
        behind: list[Any] = []
        if stage < len(self.recipe.stages):
            trigger, folder = self.recipe.stages[stage].at, self._stage(stage)
            ahead.append(StageEnd(trigger, folder, self.out / GROW_NOW, self.processes))
            behind.append(PlateauEnd(trigger, folder, self.out / GROW_NOW, self.processes))
        if before is not None:
            behind.append(NoJump(before, self._tolerance(stage), stage, first, self.reporter))
        return ahead, behind

    # -- growth ---------------------------------------------------------------------------------

    def _grow(self, stage: int) -> None:
        """Grow the last checkpoint of the stage before; whole, verified, or not there."""
        self.processes.from_first(lambda: self._write_growth(stage))
        seen = self._seen(self._grown(stage))
        for rank, other in enumerate(self.processes.gather(seen)):
            if other != seen:
                raise GrowkitError(
                    f"Process {rank} sees another folder {str(self._grown(stage))!r} than process "
                    f"{self.processes.rank}.",
                    "Choose an --out on a file system that all machines share.",
                )

    @staticmethod
    def _seen(folder: Path) -> tuple[str, dict[str, str]]:
        """What a process finds there: manifest, config and headers; files have their full size."""
        with open_checkpoint(folder) as checkpoint:
            return json.dumps(read_manifest(folder)), identity(checkpoint)

    def _write_growth(self, stage: int) -> None:
        out = self._grown(stage)
        if out.is_dir():
            return
        source = self._last_checkpoint(stage - 1)
        request = self.recipe.stages[stage - 1].request()
        self.reporter.note(f"Growth {stage}, from {source.name} of stage {stage - 1}.")
        self.reporter.log("writing and verifying the grown model")
        _, manifest = grow_checkpoint(source, out, request, reporter=self.reporter)
        self.reporter.note(f"Verification {manifest['verification']['summary']}.")
        if "optimizer_state" in manifest:
            self.reporter.note(f"{manifest['optimizer_state']['summary']}.".capitalize())

    def _tolerance(self, stage: int) -> float | None:
        manifest = read_manifest(self._grown(stage)) or {}
        if manifest.get("plan", {}).get("exactness") == Exactness.NOT_EXACT.value:
            return None
        reduced = self.recipe.training.bf16 or self.recipe.model.dtype != "float32"
        return TOLERANCE["bfloat16" if reduced else "float32"]

    # -- the whole run --------------------------------------------------------------------------

    def _merge_metrics(self) -> None:
        write_merged(self.folder / METRICS, self.stages, len(self.recipe.stages))

    def _publish(self, last: int, record: dict[str, Any]) -> dict[str, Any]:
        """The final model of the last stage as that of the run."""
        record = dict(record) | {
            "trained_tokens": tokens_with_source(self.recipe, record["tokens"]),
            "recipe": self.recipe.to_dict(),
            "stages": last + 1,
        }
        record = json.loads(json.dumps(record))  # as it will be read
        if published(self.out) == record:
            return record
        staging = self.folder / "final.partial"
        remove(staging)
        staging.mkdir()
        for path in self._stage(last).iterdir():
            if path.is_file() and path.name not in (TRAINING_RECORD, STOP, TAKEN):
                shutil.copyfile(path, staging / path.name)
        (staging / TRAINING_RECORD).write_text(json.dumps(record, indent=2) + "\n")
        rows = [row for row in read_metrics(self.folder / METRICS) if "eval_loss" in row]
        card = training_card(self.recipe.model.checkpoint, record, rows, self.out.name)
        (staging / README).write_text(card, encoding="utf-8")
        move_into(staging, self.out)
        return record
