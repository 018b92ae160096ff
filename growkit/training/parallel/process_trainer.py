"""transformers' Trainer in one process or many: what is saved, by whom, and what a resume restores.

* a checkpoint is published whole, once every process has written its part
  (:mod:`growkit.training.checkpoints`);
* random numbers continue where they were; with another number of processes than the checkpoint has,
  every process gets numbers of its own from (seed, step, rank);
* the loss that was summed since the last log line continues being summed, so that a stop between
  two lines does not change the next one;
* of a sharded model every process saves and loads its own part; nothing is gathered.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Trainer, set_seed

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import CheckpointError, UsageError
from growkit.core.records import read_record
from growkit.data.tokenizer import copy_tokenizer
from growkit.training import checkpoints
from growkit.training.averaging import average_into
from growkit.training.checkpoint_state import OPTIMIZER, RUNNING_LOSS, SCHEDULER, load_state
from growkit.training.data_position import POSITION, position_text
from growkit.training.leftovers import remove
from growkit.training.models import copy_lineage
from growkit.training.moments import REMEDY, check_optimizer_state
from growkit.training.parallel.context_parallel import SplitSequences
from growkit.training.parallel.processes import Processes
from growkit.training.parallel.sharded_optimizer import load_optimizer, save_optimizer
from growkit.training.parallel.sharding import ShardedModel
from growkit.training.recipe import Recipe
from growkit.training.router_loss import RouterLoss
from growkit.training.run_files import RunningLoss
from growkit.training.storage import writing

# Lines of its log that trainer_state.json keeps; metrics.jsonl has all of them.
KEPT_LOG_LINES = 1000


class ProcessTrainer(Trainer):
    """Saving and resuming; a subclass sets the attributes below before ``Trainer.__init__``."""

    recipe: Recipe
    folder: Path
    tokenizer_folder: Path
    processes: Processes
    sharded: ShardedModel | None = None
    router_loss: RouterLoss | None = None
    _use_cache: bool
    _writing: Path | None = None
    _resumed_from: str | None = None
    _begun: bool = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.split = SplitSequences(self.processes)
        if self.processes.context > 1 and self.router_loss is not None:
            raise UsageError(
                "The auxiliary loss of routers is taken over whole sequences, which "
                f"parallel.context {self.processes.context} divides.",
                "Set training.router_aux_loss: 0, or leave parallel.context out.",
            )
        if self.sharded is None:
            return
        if not hasattr(self, "is_distributed_loading_by_transformers"):
            raise UsageError(
                f"transformers {transformers.__version__} cannot train a model that is sharded "
                "already.",
                "Install a newer transformers, or set parallel.strategy: ddp.",
            )
        # The model has its place, and reduces its gradients itself: accelerate must not wrap it.
        # (Said to Trainer.__init__, this would forbid checkpoints, which are made below.)
        self.is_distributed_loading_by_transformers = True

    def get_tp_size(self) -> int:
        """How many processes read the same sequences: transformers counts their tokens once."""
        return self.processes.tensor

    def get_train_dataloader(self) -> Any:
        """Batches of this process's reader; accelerate would give every process its own."""
        loader = super().get_train_dataloader()
        if self.processes.readers < self.processes.count:
            shares = loader.batch_sampler
            shares.num_processes, shares.process_index = (
                self.processes.readers,
                self.processes.reader,
            )
        return loader

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if self.sharded is None:
            super()._move_model_to_device(model, device)

    def _defer_fsdp_gradient_reduction(self) -> Any:
        # Gradients are scattered after every micro-batch: they are never there as a whole.
        return contextlib.nullcontext()

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        self._resumed_from, self._begun = resume_from_checkpoint, False
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *rest: Any) -> Any:
        batches = super().get_batch_samples(epoch_iterator, *rest)
        if not self._begun:
            self._begun = True
            if self._resumed_from is not None:
                # Creating the data loader's iterator drew from the generator that dropout uses.
                self._load_rng_state(self._resumed_from)
                self._load_running_loss(Path(self._resumed_from))
            elif self._stretch:
                self._seed_this_process(0)
        samples, items = batches
        if torch.is_tensor(items):  # a step may hold questions alone: its loss is 0, not 0 / 0
            items = (items // self.processes.context).clamp(min=1)  # all count all of a sequence
        return samples, items

    def training_step(self, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
        """Forward and backward pass of a micro-batch, or of this process's stretch of it."""
        if self.processes.context == 1:
            return super().training_step(model, inputs, *more, **options)
        with self.split.applied(self.model, self._prepare_inputs(inputs)) as own:
            return super().training_step(model, own, *more, **options)

    @property
    def _stretch(self) -> int:
        """Number of the tokens that this process computes; those who share layers have the same."""
        return self.processes.rank // self.processes.tensor

    def _seed_this_process(self, step: int) -> None:
        """Random numbers of this process's own tokens, for example of dropout."""
        key = [self.recipe.training.seed, step, self._stretch]
        set_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if checkpoints.processes_of(Path(checkpoint)) == self.processes.count:
            super()._load_rng_state(checkpoint)
        else:
            self._seed_this_process(self.state.global_step)

    def _save_running_loss(self, folder: Path) -> None:
        losses = self.processes.gather(float(self._tr_loss))
        router = self.router_loss and self.processes.gather(self.router_loss.state())
        if self.processes.first:
            content = RunningLoss(
                logged_step=self._globalstep_last_logged,
                losses=losses,
                router_sums=[total for total, _ in router or ()],
                router_counts=[count for _, count in router or ()],
            )
            (folder / RUNNING_LOSS).write_text(json.dumps(content.model_dump()) + "\n")

    def _load_running_loss(self, folder: Path) -> None:
        path = folder / RUNNING_LOSS
        if not path.is_file():  # an older checkpoint; a log line preceded every save then
            return
        content = read_record(path, RunningLoss)
        losses = content.losses
        if len(losses) == self.processes.count:
            loss = losses[self.processes.rank]
        else:  # what is logged is the mean over the processes
            loss = sum(losses) / len(losses)
        self._tr_loss += torch.tensor(loss, dtype=self._tr_loss.dtype)
        self._globalstep_last_logged = content.logged_step
        if self.router_loss is not None and content.router_sums:
            sums, counts = content.router_sums, content.router_counts
            if len(sums) == len(counts) == self.processes.count:
                self.router_loss.load(sums[self.processes.rank], counts[self.processes.rank])
            elif self.processes.first:
                self.router_loss.load(sum(sums), sum(counts))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or self.folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, partial = self.state.global_step, self.folder / checkpoints.PARTIAL
        written = partial / f"checkpoint-{step}"
        self.processes.from_first(lambda: remove(partial))
        del self.state.log_history[:-KEPT_LOG_LINES]
        config = self.model.config
        switched_off, config.use_cache = config.use_cache, self._use_cache
        self._writing = partial
        try:
            with writing(written):
                super()._save_checkpoint(model, trial)
                self._save_running_loss(written)
                self.processes.barrier()  # every process has written its part
                self.processes.from_first(lambda: self._publish(written, step))
        finally:
            config.use_cache = switched_off
            if self.processes.first:
                shutil.rmtree(partial, ignore_errors=True)
            self._writing = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.sharded is None:
            super()._save(output_dir, state_dict)
            if self.recipe.training.lora is not None and output_dir is not None:
                self.model.config.save_pretrained(output_dir)  # which peft leaves to the base
        else:
            assert output_dir is not None
            self.sharded.save_pretrained(Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharded is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self._bare_optimizer(), Path(output_dir), self.processes)
        if self.processes.first:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.sharded is not None:
            self.sharded.load(folder)
            return
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.recipe.training.lora is not None:
                return
            with open_checkpoint(folder) as stored:
                left = {name for name, _ in self.model.named_parameters()} - stored.tensors.keys()
            if left:
                # Parameters that the disk names or cuts in another way (stacked experts), which
                # transformers' Trainer leaves at what the run began with.
                average_into(self.model, [folder])
        except RuntimeError as error:  # torch: tensors of other names or shapes
            raise CheckpointError(
                f"The weights of {str(folder)!r} are not those of this model.", REMEDY
            ) from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        own = [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in self._bare_optimizer().param_groups
        ]
        if self.sharded is None:
            file = Path(checkpoint) / OPTIMIZER
            check_optimizer_state(self._bare_optimizer(), state := load_state(file), file)
            # transformers would read it anew; older ones to a "cpu:0" that older torch cannot name.
            self.optimizer.load_state_dict(copy.deepcopy(state))  # no more mapped from the disk
        else:
            load_optimizer(self._bare_optimizer(), Path(checkpoint), self.processes)
        self.lr_scheduler.load_state_dict(load_state(Path(checkpoint) / SCHEDULER))
        self._keep_options(own)

    def _keep_options(self, own: list[dict[str, Any]]) -> None:
        """Rates and options are the recipe's: torch loads those that the checkpoint was saved with.

        They differ where a run goes on with another rate (growkit.training.change_point).
        """
        schedule, groups = self.lr_scheduler, self._bare_optimizer().param_groups
        schedule.base_lrs = [options["initial_lr"] for options in own]
        for group, options, factor in zip(groups, own, schedule.lr_lambdas, strict=True):
            group.update(options, lr=options["initial_lr"] * factor(schedule.last_epoch))
        schedule._last_lr = [group["lr"] for group in groups]

    def _bare_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _publish(self, written: Path, step: int) -> None:
        copy_tokenizer(self.tokenizer_folder, written)
        copy_lineage(self.recipe.model.checkpoint, written)
        (written / POSITION).write_text(position_text(self.recipe, self.train_dataset, step))
        target = self.folder / written.name
        strategy = "ddp" if self.sharded is None else "fsdp"
        checkpoints.publish(written, target, step, self.processes.count, strategy)
        checkpoints.keep_newest(self.folder, self.recipe.training.checkpoints_kept)
