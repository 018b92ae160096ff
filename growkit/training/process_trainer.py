"""transformers' Trainer in one process or many: what is saved, by whom, and what a resume restores.

* a checkpoint is published whole, once every process has written its part
  (:mod:`growkit.training.checkpoints`);
* random numbers go on where they were; with another number of processes than the checkpoint has,
  every process gets numbers of its own from (seed, step, rank);
* the loss that was summed since the last log line goes on being summed, so that a stop between two
  lines does not change the next one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, set_seed

from growkit.training import checkpoints
from growkit.training.models import copy_lineage
from growkit.training.processes import Processes
from growkit.training.recipe import Recipe
from growkit.training.tokenizer import copy_tokenizer

RUNNING_LOSS = "running_loss.json"


class ProcessTrainer(Trainer):
    """Saving and resuming; a subclass sets the attributes below before ``Trainer.__init__``."""

    recipe: Recipe
    folder: Path
    tokenizer_folder: Path
    processes: Processes
    _use_cache: bool
    _writing: Path | None = None
    _resumed_from: str | None = None
    _begun: bool = False

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
            elif not self.processes.first:
                self._seed_this_process(0)
        return batches

    def _seed_this_process(self, step: int) -> None:
        """Random numbers that are this process's own, for example of dropout."""
        key = [self.recipe.training.seed, step, self.processes.rank]
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
        if self.processes.first:
            content = {"logged_step": self._globalstep_last_logged, "losses": losses}
            (folder / RUNNING_LOSS).write_text(json.dumps(content) + "\n")

    def _load_running_loss(self, folder: Path) -> None:
        path = folder / RUNNING_LOSS
        if not path.is_file():  # an older checkpoint; a log line preceded every save then
            return
        content = json.loads(path.read_text())
        losses = content["losses"]
        if len(losses) == self.processes.count:
            loss = losses[self.processes.rank]
        else:  # what is logged is the mean over the processes
            loss = sum(losses) / len(losses)
        self._tr_loss += torch.tensor(loss, dtype=self._tr_loss.dtype)
        self._globalstep_last_logged = content["logged_step"]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or self.folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, partial = self.state.global_step, self.folder / checkpoints.PARTIAL
        written = partial / f"checkpoint-{step}"
        self.processes.from_first(lambda: shutil.rmtree(partial, ignore_errors=True))
        config = self.model.config
        switched_off, config.use_cache = config.use_cache, self._use_cache
        self._writing = partial
        try:
            super()._save_checkpoint(model, trial)
            self._save_running_loss(written)
            self.processes.barrier()  # every process has written its part
            self.processes.from_first(lambda: self._publish(written, step))
        finally:
            config.use_cache = switched_off
            if self.processes.first:
                shutil.rmtree(partial, ignore_errors=True)
            self._writing = None

    def _publish(self, written: Path, step: int) -> None:
        copy_tokenizer(self.tokenizer_folder, written)
        copy_lineage(self.recipe.model.checkpoint, written)
        target = self.folder / written.name
        checkpoints.publish(
            written, target, step, self.processes.count, self.recipe.parallel.strategy
        )
        checkpoints.keep_newest(self.folder, self.recipe.training.checkpoints_kept)
