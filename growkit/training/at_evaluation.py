# SPDX-License-Identifier: Apache-2.0
"""What a run does beside its loss: samples and tasks at evaluations, callbacks by import path, MFU.

A sample is drawn greedily and random numbers are put back behind a task, so that a run with samples
and tasks is bit for bit the run without.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from growkit.core.errors import GrowkitError, UsageError
from growkit.families import family_of
from growkit.record.cost import training_flops_of

if TYPE_CHECKING:
    from growkit.training.recipe import Recipe

# Dense bfloat16 FLOPs a second of one device, by the maker's data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
}


class AtEvaluation:
    """Samples and tasks of a recipe, measured on a model that trains.

    Args:
        folder: of the run, for the harness's records.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, folder: Path) -> None:
        section = recipe.training
        self.samples, self.tasks, self.every = section.samples, section.eval_tasks, 1
        self.tokenizer, self.folder, self.eval_steps = tokenizer, folder, section.eval_steps
        if self.tasks is not None:
            from growkit.evaluation.harness import check_installed

            self.every = self.tasks.every
            check_installed("training.eval_tasks")

    def figures(self, model: Any, step: int) -> dict[str, Any]:
        """``eval_sample/N`` -> text and ``eval_task/NAME/METRIC`` -> number, for the trackers."""
        training = model.training
        model.eval()
        cache = getattr(model.config, "use_cache", None)
        try:
            return self._samples(model) | self._tasks(model, step)
        finally:
            model.train(training)
            if cache is not None:
                model.config.use_cache = cache

    @torch.no_grad()
    def _samples(self, model: Any) -> dict[str, str]:
        if self.samples is None:
            return {}
        found, end = {}, self.tokenizer.eos_token_id
        for number, prompt in enumerate(self.samples.prompts, 1):
            ids = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
            written = model.generate(
                ids.to(model.device),
                attention_mask=torch.ones_like(ids, device=model.device),
                max_new_tokens=self.samples.max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=end,
                pad_token_id=end if end is not None else 0,
            )
            new = written[0, ids.shape[1] :].tolist()
            found[f"eval_sample/{number}"] = self.tokenizer.decode(new, skip_special_tokens=True)
        return found

    def _tasks(self, model: Any, step: int) -> dict[str, float]:
        if self.tasks is None or (step // self.eval_steps) % self.every:
            return {}
        from growkit.evaluation.harness import run_tasks
        from growkit.evaluation.model import LoadedModel

        dtype = str(model.dtype).removeprefix("torch.")
        loaded = LoadedModel(self.folder, model, self.tokenizer, model.device, dtype)
        with random_numbers_put_back():
            measured = run_tasks(
                loaded,
                self.tasks.tasks,
                include_path=self.tasks.include_path,
                fewshot=self.tasks.fewshot,
                limit=self.tasks.limit,
            )
        return {
            f"eval_task/{task}/{name}": value
            for task, metrics in measured.items()
            for name, value in metrics.items()
            if isinstance(value, int | float) and name != "samples"
        }


@contextmanager
def random_numbers_put_back() -> Iterator[None]:
    """The harness seeds every generator there is."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


class StopEarly(EarlyStoppingCallback):
    """transformers' EarlyStoppingCallback on the held-out loss; the step it stops at is saved."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Nothing to warn of: the final folder is that of the last step."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> Any:
        super().on_evaluate(args, state, control, metrics)
        if control.should_training_stop:
            control.should_save = True
        return control


def named_callbacks(entries: Sequence[str | Mapping[str, Any]]) -> list[TrainerCallback]:
    """The callbacks of ``training.callbacks``; modules of the current folder are found too.

    Raises:
        UsageError: there is no such module or class, it is no callback, or does not take the
            arguments.
    """
    found = []
    for entry in entries:
        path, options = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        module, _, name = path.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            cls = getattr(importlib.import_module(module), name)
            callback = cls(**(options or {}))
        except Exception as error:  # whatever somebody's module raises
            raise UsageError(
                f"training.callbacks names {path!r}, which cannot be made: "
                f"{type(error).__name__}: {error}.",
                "Give module:Class of a transformers TrainerCallback, with its arguments as "
                "{module:Class: {name: value}}; the current folder is looked in too.",
            ) from error
        if not isinstance(callback, TrainerCallback):
            raise UsageError(
                f"training.callbacks names {path!r}, which is no transformers TrainerCallback.",
                "Give a class that derives from transformers.TrainerCallback.",
            )
        found.append(callback)
    return found


def utilisation_of(recipe: Recipe, model: Any, processes: int) -> float | None:
    """What times tokens per second is MFU (model FLOPs utilisation); None where it is not known.

    MFU is the FLOPs that the model needs, three forward passes a token without those that
    activation checkpointing repeats, over the peak of all devices (arXiv:2204.02311, appendix B).
    """
    peak = recipe.training.peak_flops_per_second
    if peak is None and torch.cuda.is_available() and not recipe.training.use_cpu:
        name = torch.cuda.get_device_name()
        peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    if peak is None:
        return None
    config, length = model.config.to_dict(), recipe.data.sequence_length
    try:
        family = family_of(config, [name for name, _ in model.named_parameters()])
        flops = training_flops_of(family, family.sizes_of(config), length, config)
    except (GrowkitError, KeyError):  # no table: nothing is known of its FLOPs
        return None
    return flops / (peak * processes)
