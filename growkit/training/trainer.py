"""transformers' Trainer, overridden only where this project knows more.

* the order of samples is a pure function of seed and step (`growkit.data.order`);
* evaluation weighs every token equally and draws no random numbers;
* every save is preceded by a log line, so that the losses logged after a resume are the ones that
  the uninterrupted run logs (a mean never spans a checkpoint).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl

from growkit.core.errors import Diverged
from growkit.core.progress import Progress
from growkit.data.order import RunSampler
from growkit.data.packing import PackedDataset
from growkit.training.adapters import adapter_slots
from growkit.training.at_evaluation import AtEvaluation
from growkit.training.averaging import average_into, last_whole
from growkit.training.compiling import CompileChoice
from growkit.training.data_position import sample_order
from growkit.training.document_check import DocumentCheck
from growkit.training.evaluate import evaluate
from growkit.training.growth.trainer_hooks import GrowthTraining
from growkit.training.live import LiveFigures, log_line
from growkit.training.metrics import append_metrics
from growkit.training.parallel.context_parallel import ContextCheck
from growkit.training.parallel.process_trainer import ProcessTrainer
from growkit.training.parallel.processes import Processes, on_cpu
from growkit.training.parallel.sharding import ShardedModel
from growkit.training.recipe import Recipe
from growkit.training.router_loss import router_loss_of
from growkit.training.schedule import learning_rate_factor
from growkit.training.trackers import log_beside


def training_arguments(
    recipe: Recipe, folder: Path, *, evaluation: bool, processes: int = 1
) -> TrainingArguments:
    """The recipe in transformers' terms; ``folder`` receives the checkpoints."""
    section = recipe.training
    batch_size, accumulation_steps = recipe.shares(processes)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.end_step,
        learning_rate=section.learning_rate,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation_steps,
        max_grad_norm=section.max_grad_norm,
        bf16=section.bf16,
        **{_checkpointing_name(): section.gradient_checkpointing},
        torch_compile=section.torch_compile is True,  # auto: growkit.training.compiling
        # Said explicitly: without it, several processes on a machine without a GPU would each
        # train alone (accelerate's DistributedType.NO).
        use_cpu=on_cpu(recipe),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        dataloader_num_workers=section.dataloader_num_workers,
        full_determinism=section.full_determinism,
        seed=section.seed,
        logging_steps=section.logging_steps,
        logging_first_step=True,
        # A loss that is not a number must be seen, not averaged away.
        logging_nan_inf_filter=False,
        # Of training.early_stopping, which counts on where the checkpoint's run stood.
        metric_for_best_model="eval_loss" if section.early_stopping else None,
        greater_is_better=False if section.early_stopping else None,
        restore_callback_states_from_checkpoint=section.early_stopping is not None,
        eval_strategy="steps" if evaluation else "no",
        eval_steps=section.eval_steps,
        save_strategy="steps",
        save_steps=section.save_steps,
        report_to=section.report_to or "none",
        disable_tqdm=True,
        # The sampler starts at the right place by itself.
        ignore_data_skip=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu(recipe),
    )
    if arguments.n_gpu > 1:
        # transformers would wrap the model in DataParallel and multiply the batch size.
        arguments._n_gpu = 1
    return arguments


def _checkpointing_name() -> str:
    """The option was renamed within transformers 5, and the old name warns."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    new = "activation_checkpointing"
    return new if new in names else "gradient_checkpointing"


class RunTrainer(ProcessTrainer):
    """A Trainer for one recipe.

    Args:
        folder: where ``checkpoint-N`` folders go.
        held_out: sequences to evaluate on, or None.
        tokenizer_folder: its tokenizer files are copied into every checkpoint.
        log: told what the run is at.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        folder: Path,
        train: PackedDataset,
        held_out: PackedDataset | None,
        *,
        tokenizer_folder: Path,
        callbacks: list[TrainerCallback],
        processes: Processes | None = None,
        sharded: ShardedModel | None = None,
        at_evaluation: AtEvaluation | None = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.say, self.at_evaluation = log, at_evaluation
        self.recipe, self.folder, self.tokenizer_folder = recipe, folder, tokenizer_folder
        self.held_out = held_out
        self.processes, self.sharded = processes or Processes(), sharded
        self.optimizer: Any
        self.lr_scheduler: Any
        self.router_loss = router_loss_of(model, recipe)
        self.compiling = CompileChoice(
            recipe, folder.parent, self.processes, separate=train.separate, say=log
        )
        self._begins = -1  # the step whose first micro-batch was seen last
        self._averaged = 0
        self.control: TrainerControl
        # transformers switches it off for the training; what is written keeps the model's own.
        self._use_cache = getattr(model.config, "use_cache", True)
        arguments = training_arguments(
            recipe, folder, evaluation=held_out is not None, processes=self.processes.readers
        )
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        log_beside(self.callback_handler.callbacks, folder.parent / "tensorboard")
        if train.separate:
            self.add_callback(DocumentCheck(train.length, log))
        if self.processes.context > 1:  # with the attention that the one before may have chosen
            after = sharded.reshard if sharded is not None else lambda: None
            self.add_callback(ContextCheck(self.split, self.processes, train.length, after))

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        self.args.eval_on_start = self.held_out is not None and not resume_from_checkpoint
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **options)
        self.model.config.use_cache = self._use_cache
        if self.state.global_step >= self.recipe.total_steps:  # not when a signal stopped it
            self._average()
        return result

    def _average(self) -> None:
        """Take the mean of the last checkpoints, and see how good it is."""
        count = self.recipe.training.average_checkpoints
        if count > 1:
            average_into(self.model, last_whole(self.folder, count))
            self._averaged = count
            if self.held_out is not None:
                self.evaluate()

    def _init_training_state(self, *arguments: Any, **options: Any) -> Any:
        result = super()._init_training_state(*arguments, **options)
        # A stage begins where the one before ended; a resumed one knows its step.
        self.state.global_step = max(self.state.global_step, self.recipe.first_step)
        return result

    def _get_train_sampler(self, train_dataset: Any = None) -> RunSampler:
        return RunSampler(
            order=sample_order(self.recipe, self.train_dataset),
            sequences_per_step=self.recipe.sequences_per_step,
            # Of this stage: a run that has all of its steps must be given no further sample.
            total_steps=self.recipe.end_step,
            steps_done=lambda: self.state.global_step,
        )

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            target = self.model if model is None else model
            adapted = self.recipe.training.lora is not None
            slots = adapter_slots(target, self.recipe) if adapted else None
            self.growth = GrowthTraining(target, self.recipe, self._steps_taken, slots)
            self.optimizer = self.growth.optimizer
        return self.optimizer

    def _steps_taken(self) -> int:
        return self.state.global_step - self.recipe.first_step

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, learning_rate_factor(self.recipe)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The language-model loss; where the recipe asks for it, its gradient has both."""
        if self.router_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "output_router_logits": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # A loss that is a mean over the tokens of the whole step is not divided afterwards.
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        parts = self.args.gradient_accumulation_steps if scaled else 1
        loss = self.router_loss.join(loss, outputs.aux_loss, parts)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
        if self.compiling.undecided and self._begins != self.state.global_step:
            self._begins = self.state.global_step
            self._choose_compiling(model, dict(inputs), *more, **options)
        with self.compiling.applied(self.model):
            loss = super().training_step(model, inputs, *more, **options)
        if self.accelerator.sync_gradients:
            self.growth.after_backward()
        return loss

    def _choose_compiling(self, *given: Any, **options: Any) -> None:
        before = None if self.router_loss is None else self.router_loss.state()

        def trial() -> None:
            super(RunTrainer, self).training_step(*given, **options)
            self.model.zero_grad(set_to_none=True)

        seconds = self.compiling.before_step(self.model, self._begins, trial)
        if self.router_loss is not None and before is not None:
            self.router_loss.load(*before)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RunCallback):
                callback.pause(seconds)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.growth.gradient_norms()
            if self.router_loss is not None:
                logs["router_aux_loss"] = self.router_loss.take(self.processes)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, RunCallback):  # before the trackers see them
                    logs |= callback.speed(self.state.global_step)
        super().log(logs, start_time)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate on the held-out sequences, and log it."""
        assert self.held_out is not None
        section = self.recipe.training
        self.say(f"step {self.state.global_step:,}: evaluating on the held-out text")
        metrics = evaluate(
            self.model,
            self.held_out,
            batch_size=section.per_device_eval_batch_size or section.per_device_train_batch_size,
            processes=self.processes,
            split=self.split,
        )
        if self.sharded is not None:
            self.sharded.reshard()
        if self._averaged:
            metrics["averaged_checkpoints"] = self._averaged
        logged: dict[str, Any] = named_for_trackers(metrics)
        if self.at_evaluation is not None and self.processes.first:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            logged |= self.at_evaluation.figures(model, self.state.global_step)
        self.log(logged)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def named_for_trackers(metrics: dict[str, float]) -> dict[str, float]:
    """Held-out figures under names that trackers put under ``eval/``, perplexities of sources too.

    transformers' integrations put ``eval_NAME`` under ``eval/NAME`` and all else under ``train/``.
    """
    named = {f"eval_{name.removeprefix('eval_')}": value for name, value in metrics.items()}
    for name, value in metrics.items():
        if name.startswith("eval_loss/"):
            source = name.removeprefix("eval_loss/")
            named[f"eval_perplexity/{source}"] = math.exp(min(value, 700.0))
    return named


class RunCallback(TrainerCallback):
    """Writes metrics.jsonl, moves the progress bar, and stops at a loss that is not a number."""

    def __init__(
        self,
        recipe: Recipe,
        metrics: Path,
        bar: Callable[[], Progress],
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.recipe, self.metrics, self.bar, self.say = recipe, metrics, bar, log
        self.first = True
        self.live = LiveFigures(recipe, metrics)
        self.clock, self.clock_step = time.monotonic(), 0
        self.utilisation: float | None = None  # MFU is this times tokens per second

    def speed(self, step: int) -> dict[str, float]:
        """Tokens per second since the last line, and MFU where the device's peak is known."""
        now = time.monotonic()
        done = (step - self.clock_step) * self.recipe.tokens_per_step
        speed = done / max(now - self.clock, 1e-9)
        self.clock, self.clock_step = now, step
        found = {"tokens_per_second": round(speed, 1)}
        if self.utilisation is not None:
            found["mfu"] = float(f"{speed * self.utilisation:.4g}")
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A resumed state holds the intervals of the run that saved it.
        state.compute_steps(args, state.max_steps)
        self.clock, self.clock_step = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_log |= control.should_save or control.should_evaluate
        if self.first:
            self.first = False
            self.say(f"first step done after {time.monotonic() - self.clock:.1f} s")
        self.bar().advance(self.recipe.tokens_per_step)
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Evaluation time does not count in tokens per second.
        self.clock, self.clock_step = time.monotonic(), state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.say(f"step {state.global_step:,}: checkpoint saved")
        self.clock, self.clock_step = time.monotonic(), state.global_step

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on training."""
        self.clock += seconds

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        step, tokens = state.global_step, state.global_step * self.recipe.tokens_per_step
        row: dict[str, Any] = {"step": step, "tokens": tokens}
        if self.recipe.position is not None:
            row["stage"] = self.recipe.position.stage
        if "loss" in logs:
            row |= {"loss": logs["loss"], "learning_rate": logs["learning_rate"]}
            more = ("grad_norm", "grad_norm_old", "grad_norm_new", "router_aux_loss")
            row |= {"grad_norm": None, **{name: logs[name] for name in more if name in logs}}
            row |= {key: logs[key] for key in ("tokens_per_second", "mfu") if key in logs}
            self._refuse_non_finite(step, row)
        elif "eval_loss" in logs:
            row |= self._held_out(logs)
        else:
            return
        self.bar().figures(self.live.after(row))
        self.say(log_line(self.recipe, row))
        if state.is_world_process_zero:
            append_metrics(self.metrics, row)

    def _held_out(self, logs: dict[str, Any]) -> dict[str, Any]:
        row = {key: logs[key] for key in logs if key.partition("/")[0] == "eval_loss"}
        for name in ("perplexity", "bits_per_byte", "averaged_checkpoints"):
            if f"eval_{name}" in logs:
                row[name] = logs[f"eval_{name}"]
        tasks = {key: logs[key] for key in logs if key.startswith("eval_task/")}
        samples = self.recipe.training.samples
        if samples is not None and "eval_sample/1" in logs:
            row["samples"] = [
                {"prompt": prompt, "text": logs[f"eval_sample/{number}"]}
                for number, prompt in enumerate(samples.prompts, 1)
            ]
        return row | tasks

    def _refuse_non_finite(self, step: int, row: dict[str, Any]) -> None:
        for name in ("loss", "grad_norm"):
            if row[name] is not None and not math.isfinite(row[name]):
                raise Diverged(
                    f"The {name.replace('_', ' ')} is {row[name]} at step {step}.",
                    "Lower training.learning_rate or raise training.warmup_steps; if the source "
                    "checkpoint itself holds NaN, repair it first.",
                )
