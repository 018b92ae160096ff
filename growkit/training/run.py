"""One training run, from a recipe to a folder.

What it leaves in OUT::

    config.json, model.safetensors, tokenizer files   the trained model: a checkpoint folder like
                                                      any other (written at the end)
    growkit.json             lineage, when the run started from a grown checkpoint
    growkit_training.json    the recipe and the final figures
    data_position.json       where it stands in its data (growkit.training.data_position)
    training/
      recipe.yaml            the recipe as it ran, overrides included
      metrics.jsonl          see growkit.training.metrics
      loss.png               when matplotlib is installed
      tokenizer/             the tokenizer of the run
      data/                  packed tokens, unless data.cache_dir says where
      checkpoints/           see growkit.training.checkpoints

The same command continues where a killed run stopped, and the result is the same: on one machine
with the same number of threads, losses and weights are bit for bit those of the uninterrupted run.

Started by torchrun, several processes make the same run together: the first one (rank 0) writes and
reports, the sequences of a step are shared (see docs/distributed.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.core.errors import GrowkitError, RunStopped, UsageError
from growkit.core.names import METRICS, RECIPE
from growkit.core.progress import Progress, Reporter, Silent
from growkit.core.quantities import counted
from growkit.data.sources import Corpus, corpus_of
from growkit.record.card import training_card
from growkit.training import checkpoints, metrics
from growkit.training.change_point import changes_in, stored_change, take_up
from growkit.training.data_position import position_text
from growkit.training.growth.grown import loss_before_growth, new_parameters_of, tokens_with_source
from growkit.training.leftovers import remove
from growkit.training.parallel.launch import check_launch
from growkit.training.published import published
from growkit.training.rate_rule import tied_note
from growkit.training.recipe import Recipe
from growkit.training.run_folder import (
    check_source,
    open_run,
    resume_point,
)
from growkit.training.run_inputs import run_inputs
from growkit.training.run_result import TrainingResult, make_result
from growkit.training.storage import says_what_is_kept
from growkit.training.trackers import check_trackers

if TYPE_CHECKING:
    from growkit.data.packing import PackedDataset
    from growkit.training.parallel.processes import Processes
    from growkit.training.parallel.sharding import ShardedModel
    from growkit.training.trainer import RunTrainer


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    reporter: Reporter | None = None,
    callbacks: tuple[Sequence[Any], Sequence[Any]] = ((), ()),
) -> TrainingResult:
    """Run a recipe, or continue with it.

    Args:
        resume: ``auto`` (the newest whole checkpoint in ``out``, if any), ``never``, or the path of
            a checkpoint folder; one of another run begins a change point
            (:mod:`growkit.training.change_point`).
        overwrite: throw away an earlier run in ``out``.
        callbacks: of transformers, called before and after the one that writes metrics.

    Raises:
        UsageError: the recipe, the data and ``out`` do not go together; an earlier run in ``out``
            is as it was, and a run that took no step may be repeated with another recipe.
        GrowkitError: the loss became NaN, or another process is training into ``out``.
        RunStopped: SIGTERM or SIGHUP; a checkpoint of the last whole step is saved.
    """
    reporter = reporter or Silent()
    started = time.monotonic()
    out = out.resolve()
    if recipe.stages:
        from growkit.training.growth.stages import train_stages

        return train_stages(
            recipe, out, train, resume=resume, overwrite=overwrite, reporter=reporter
        )
    count = check_launch(recipe)
    corpus = corpus_of(recipe.data)  # checks the files before anything is written
    check_source(recipe, out)
    new_parameters_of(recipe)

    from growkit.training.parallel.processes import join, waiting
    from growkit.verification.loading import quiet_transformers

    with quiet_transformers(), ExitStack() as stack:
        processes = join(recipe, count)
        run = _Run(recipe, corpus, out, resume, reporter if processes.first else Silent(),
                   processes, started, callbacks)  # fmt: skip
        stack.enter_context(says_what_is_kept(run.folder))
        opened = open_run(recipe, out, run.folder, resume, overwrite, run.reporter)
        processes.from_first(lambda: stack.enter_context(opened))
        run.check_shared()
        with waiting():
            return run.run()


@dataclass(frozen=True)
class _Run:
    """What the parts of a run have in common."""

    recipe: Recipe
    corpus: Corpus
    out: Path
    resume: str
    reporter: Reporter
    processes: Processes
    started: float
    callbacks: tuple[Sequence[Any], Sequence[Any]] = ((), ())

    @property
    def folder(self) -> Path:
        return self.out / "training"

    def check_shared(self) -> None:
        """Every process must see the folder that the first one writes."""
        if not (self.folder / RECIPE).is_file():
            raise GrowkitError(
                f"Process {self.processes.rank} does not see {str(self.folder)!r}, which the first "
                "process made.",
                "Choose an --out on a file system that all machines share.",
            )

    def run(self) -> TrainingResult:
        from growkit.training.models import build_model, publish_model, scale_starts
        from growkit.training.parallel.sharding import build_sharded

        check_trackers(self.recipe.training.report_to)
        inputs = run_inputs(self.recipe, self.corpus, self.folder, self.processes, self.reporter)
        train_set, held_out, tokenizer, tokenizer_folder = inputs
        checkpoint, finished = self.processes.from_first(self._where_to_begin)
        if finished is not None:
            return make_result(finished, self.out, self.folder, self.started, str(checkpoint))
        sharded = None
        self.reporter.log("loading the model")
        if self.recipe.parallel.sharded:
            sharded = build_sharded(self.recipe, tokenizer, self.processes)
            model = sharded.model
        else:
            model = build_model(self.recipe.model, tokenizer, self.recipe.training.seed)
            scale_starts(model, self.recipe)
        lora = self.recipe.training.lora is not None
        if lora:
            from growkit.training.adapters import with_adapters

            model = with_adapters(model, self.recipe)
        if note := tied_note(self.recipe, model.config.to_dict()):
            self.reporter.note(note)
        _check_length(model, self.recipe)
        trainer = self._train(
            model, sharded, train_set, held_out, tokenizer, tokenizer_folder, checkpoint
        )
        record = self._record(trainer, model)
        self.reporter.log("writing the trained model")
        staging = self.folder / "final.partial"
        if sharded is not None:
            self.processes.from_first(lambda: remove(staging))
            sharded.save_pretrained(staging)
        self.processes.from_first(
            lambda: publish_model(
                trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
                if sharded is None
                else None,
                self.out,
                staging,
                tokenizer_folder=tokenizer_folder,
                source=self.recipe.model.checkpoint,
                record=record,
                save_dtype=self.recipe.training.save_dtype,
                position=position_text(self.recipe, train_set, record["steps"]),
                card=self._card(record),
                adapter=lora,
            )
        )
        begin = str(checkpoint) if checkpoint else None
        return make_result(record, self.out, self.folder, self.started, begin)

    def _card(self, record: dict[str, Any]) -> str:
        rows = [row for row in metrics.read_metrics(self.folder / METRICS) if "eval_loss" in row]
        return training_card(self.recipe.model.checkpoint, record, rows, self.out.name)

    def _where_to_begin(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The checkpoint to continue from, and the record of a run that is finished."""
        folder = self.folder
        checkpoint = resume_point(folder / "checkpoints", self.resume, self.reporter)
        step = checkpoints.step_of(checkpoint) if checkpoint else -1
        stops = step >= self.recipe.end_step or self.recipe.training.early_stopping is not None
        record = published(self.out) if stops else None
        if (
            record is not None
            and record["steps"] == step
            and (step >= self.recipe.end_step or record.get("stopped_early"))
        ):
            self.reporter.note(f"{self.out} is finished: {record['steps']} steps.")
            return checkpoint, record
        point = stored_change(folder)
        if point is not None and checkpoint == Path(point.checkpoint):
            take_up(point, self.recipe, folder, self.reporter)
        metrics.truncate_metrics(folder / METRICS, step)
        return checkpoint, None

    def _train(
        self,
        model: Any,
        sharded: ShardedModel | None,
        train_set: PackedDataset,
        held_out: PackedDataset | None,
        tokenizer: Any,
        tokenizer_folder: Path,
        checkpoint: Path | None,
    ) -> RunTrainer:
        from growkit.training.at_evaluation import (
            AtEvaluation,
            StopEarly,
            named_callbacks,
            utilisation_of,
        )
        from growkit.training.growth.grown import GrownOptimizer
        from growkit.training.growth.probes import probes_of
        from growkit.training.router_loss import has_routers, unbalanced
        from growkit.training.stop import StopOnSignal
        from growkit.training.trainer import RunCallback, RunTrainer

        recipe, section = self.recipe, self.recipe.training
        bars: list[Progress] = []
        stop = StopOnSignal(self.processes)
        log = RunCallback(recipe, self.folder / METRICS, lambda: bars[0], self.reporter.log)
        plain = section.lora is None  # what is told by names of parameters needs its own ones
        if plain:
            log.utilisation = utilisation_of(recipe, model, self.processes.count)
        early = []
        if section.early_stopping is not None:
            rule = section.early_stopping
            early = [StopEarly(rule.patience, rule.threshold)]
        trainer = RunTrainer(
            model,
            recipe,
            self.folder / "checkpoints",
            train_set,
            held_out,
            tokenizer_folder=tokenizer_folder,
            callbacks=[
                *self.callbacks[0],
                log,
                *(
                    probes_of(recipe, model, held_out or train_set, log.metrics, log.pause)
                    if plain
                    else []
                ),
                stop,
                *(GrownOptimizer.of(recipe, self.reporter) if plain else []),
                *early,
                *named_callbacks(section.callbacks or []),
                *self.callbacks[1],
            ],
            processes=self.processes,
            sharded=sharded,
            at_evaluation=AtEvaluation(recipe, tokenizer, self.folder)
            if section.samples or section.eval_tasks
            else None,
            log=self.reporter.log,
        )
        if has_routers(model) and not trainer.router_loss and recipe.training.router_aux_loss != 0:
            self.reporter.note(unbalanced(model))
        steps_done = checkpoints.step_of(checkpoint) if checkpoint else recipe.first_step
        remaining = max(recipe.end_step - steps_done, 0) * recipe.tokens_per_step
        self.reporter.log(
            f"training: step {steps_done:,} to {recipe.end_step:,}, {recipe.tokens_per_step:,} "
            "tokens per step"
        )
        with self.reporter.progress("training", remaining, unit="tokens") as bar, stop:
            bars.append(bar)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.stopped:
            step = trainer.state.global_step
            stopped = RunStopped(
                f"{stop.signal.name} at step {step} of {recipe.end_step}, which is saved.",
                "The same command continues from there.",
            )
            stopped.exit_code = 128 + stop.signal
            raise stopped
        if section.early_stopping is not None and trainer.state.global_step < recipe.end_step:
            self.reporter.note(
                f"Stopped at step {trainer.state.global_step} of {recipe.end_step}: the held-out "
                f"loss did not fall in {counted(section.early_stopping.patience, 'evaluation')}."
            )
        return trainer

    def _stopped_early(self, steps: int) -> bool:
        return self.recipe.training.early_stopping is not None and steps < self.recipe.end_step

    def _record(self, trainer: RunTrainer, model: Any) -> dict[str, Any]:
        """The final figures, evaluated where the last step was not."""
        file, steps = self.folder / METRICS, trainer.state.global_step

        def evaluated() -> bool:
            last = metrics.last_evaluation(metrics.read_metrics(file))
            return last is not None and last["step"] == steps

        if trainer.held_out is not None and not self.processes.from_first(evaluated):
            trainer.evaluate()
        return self.processes.from_first(lambda: self._finish(file, trainer, model))

    def _finish(self, file: Path, trainer: RunTrainer, model: Any) -> dict[str, Any]:
        from growkit.training.run_inputs import data_use

        steps = trainer.state.global_step
        rows = metrics.read_metrics(file)
        last = metrics.last_evaluation(rows) or {}
        losses = [row["loss"] for row in rows if "loss" in row]
        plot = self.folder / "loss.png"
        changes = changes_in(rows)
        marks = [(change["step"] * self.recipe.tokens_per_step, "change") for change in changes]
        metrics.draw_losses(
            [("held-out", rows, 0)], plot, self.reporter, title=self.out.name, marks=marks[:1]
        )
        return {
            "format": 1,
            "steps": steps,
            "tokens": steps * self.recipe.tokens_per_step,
            "trained_tokens": tokens_with_source(
                self.recipe, (steps - self.recipe.first_step) * self.recipe.tokens_per_step
            ),
            "parameters": sum(p.numel() for p in model.parameters()),
            "loss": losses[-1] if losses else None,
            **{k: last.get(k) for k in ("eval_loss", "perplexity", "bits_per_byte")},
            "held_out_tokens": trainer.held_out.predicted_tokens if trainer.held_out else 0,
            "loss_before_growth": loss_before_growth(self.recipe, rows),
            "data": data_use(self.recipe, trainer.train_dataset, steps),
            **({"changes": changes} if changes else {}),
            **({"stopped_early": True} if self._stopped_early(steps) else {}),
            "recipe": self.recipe.to_dict(),
        }


def _check_length(model: Any, recipe: Recipe) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and recipe.data.sequence_length > limit:
        raise UsageError(
            f"data.sequence_length is {recipe.data.sequence_length} and the model has positions "
            f"for {limit}.",
            f"Set data.sequence_length to at most {limit}.",
        )
