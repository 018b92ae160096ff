"""One training run, from a recipe to a folder.

What it leaves in OUT::

    config.json, model.safetensors, tokenizer files   the trained model: a checkpoint folder like
                                                      any other (written at the end)
    growkit.json             lineage, when the run started from a grown checkpoint
    growkit_training.json    the recipe and the final figures
    training/
      recipe.yaml            the recipe as it ran, overrides included
      metrics.jsonl          see growkit.training.metrics
      loss.png               when matplotlib is installed
      tokenizer/             the tokenizer of the run
      data/                  packed tokens, unless data.cache_dir says where
      checkpoints/           see growkit.training.checkpoints

The same command goes on where a killed run stopped, and the result is the same: on one machine with
the same number of threads, losses and weights are bit for bit those of the uninterrupted run.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from growkit.errors import UsageError
from growkit.progress import Progress, Reporter, Silent
from growkit.training import checkpoints, metrics
from growkit.training.grown import new_parameters_of, tokens_with_source
from growkit.training.recipe import Recipe
from growkit.training.run_folder import (
    DONE,
    check_data,
    check_source,
    prepare_folder,
    resume_point,
)
from growkit.training.run_result import TrainingResult, make_result
from growkit.training.sources import Corpus, corpus_of


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> TrainingResult:
    """Run a recipe, or go on with it.

    Args:
        resume: ``auto`` (the newest whole checkpoint in ``out``, if any), ``never``, or the path of
            a checkpoint folder.
        overwrite: throw away an earlier run in ``out``.

    Raises:
        UsageError: the recipe, the data and ``out`` do not go together; an earlier run in ``out``
            is as it was, and a run that took no step may be repeated with another recipe.
        GrowkitError: the loss became NaN.
    """
    reporter = reporter or Silent()
    started = time.monotonic()
    out, folder = out.resolve(), out.resolve() / "training"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "growkit train was started as several processes, which it does not support yet.",
            "Start it once, without torchrun or accelerate launch.",
        )
    corpus = corpus_of(recipe.data)  # checks the files before anything is written
    check_source(recipe, out)
    new_parameters_of(recipe)
    prepare_folder(recipe, out, folder, resume, overwrite, reporter)

    from growkit.verify.loading import quiet_transformers

    with quiet_transformers():
        return _run(recipe, corpus, out, folder, resume, reporter, started)


def _run(
    recipe: Recipe,
    corpus: Corpus,
    out: Path,
    folder: Path,
    resume: str,
    reporter: Reporter,
    started: float,
) -> TrainingResult:
    from growkit.training.data_use import data_use, warn_of_repeats
    from growkit.training.models import build_model, publish_model
    from growkit.training.packing import datasets, pack
    from growkit.training.tokenizer import load_tokenizer, tokenizer_fingerprint
    from growkit.training.trainer import RunCallback, RunTrainer

    tokenizer_folder = _tokenizer_folder(recipe, corpus, folder, reporter)
    tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=recipe.model.trust_remote_code)
    packed = pack(
        corpus,
        tokenizer,
        tokenizer_fingerprint(tokenizer_folder),
        recipe.data.cache_dir or folder / "data",
        reporter,
        workers=recipe.data.workers,
    )
    check_data(folder, packed.key)
    train_set, held_out = datasets(packed, recipe.data)
    warn_of_repeats(recipe, train_set, reporter)
    checkpoint = resume_point(folder / "checkpoints", resume, reporter)
    metrics_file = folder / "metrics.jsonl"
    done = out / DONE
    if checkpoint is not None and done.is_file():
        record = json.loads(done.read_text())
        if record["steps"] == checkpoints.step_of(checkpoint) >= recipe.total_steps:
            reporter.note(f"{out} is finished: {record['steps']} steps.")
            return make_result(record, out, folder, started, str(checkpoint))
    model = build_model(recipe.model, tokenizer, recipe.training.seed)
    _check_length(model, recipe)
    resumed_step = checkpoints.step_of(checkpoint) if checkpoint else 0
    metrics.truncate_metrics(metrics_file, resumed_step if checkpoint else -1)

    bars: list[Progress] = []
    trainer = RunTrainer(
        model,
        recipe,
        folder / "checkpoints",
        train_set,
        held_out,
        tokenizer_folder=tokenizer_folder,
        callbacks=[RunCallback(recipe, metrics_file, lambda: bars[0])],
    )
    remaining = max(recipe.total_steps - resumed_step, 0) * recipe.tokens_per_step
    with reporter.progress("training", remaining, unit="tokens") as bar:
        bars.append(bar)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    rows = metrics.read_metrics(metrics_file)
    steps = trainer.state.global_step
    last = metrics.last_evaluation(rows)
    if held_out is not None and (last is None or last["step"] != steps):
        trainer.evaluate()
        rows = metrics.read_metrics(metrics_file)
        last = metrics.last_evaluation(rows)
    losses = [row["loss"] for row in rows if "loss" in row]
    record = {
        "format": 1,
        "steps": steps,
        "tokens": steps * recipe.tokens_per_step,
        "trained_tokens": tokens_with_source(recipe, steps * recipe.tokens_per_step),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": losses[-1] if losses else None,
        **{k: last.get(k) if last else None for k in ("eval_loss", "perplexity", "bits_per_byte")},
        "data": data_use(recipe, train_set, steps),
        "recipe": recipe.to_dict(),
    }
    if not metrics.plot_losses([("held-out", rows, 0)], folder / "loss.png", title=out.name):
        reporter.note("No loss.png: matplotlib is not installed (pip install 'growkit[plots]').")
    publish_model(
        trainer.accelerator.unwrap_model(model, keep_torch_compile=False),
        out,
        folder / "final.partial",
        tokenizer_folder=tokenizer_folder,
        source=recipe.model.checkpoint,
        record=record,
        save_dtype=recipe.training.save_dtype,
    )
    return make_result(record, out, folder, started, str(checkpoint) if checkpoint else None)


def _tokenizer_folder(recipe: Recipe, corpus: Corpus, folder: Path, reporter: Reporter) -> Path:
    """The folder that holds the tokenizer; a trained one is trained now, once."""
    from growkit.training.tokenizer import train_bpe

    section = recipe.tokenizer
    if section is None:
        assert recipe.model.checkpoint is not None
        return recipe.model.checkpoint
    if section.path is not None:
        return section.path
    target = folder / "tokenizer"
    if not target.is_dir():
        partial = folder / "tokenizer.partial"
        shutil.rmtree(partial, ignore_errors=True)
        size = section.train_bpe or 257
        if section.train_bpe:
            reporter.note(f"Training a BPE tokenizer of {size} tokens on the training text.")
        train_bpe(corpus.train_documents(), size, partial)
        partial.rename(target)
    return target


def _check_length(model: Any, recipe: Recipe) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and recipe.data.sequence_length > limit:
        raise UsageError(
            f"data.sequence_length is {recipe.data.sequence_length} and the model has positions "
            f"for {limit}.",
            f"Set data.sequence_length to at most {limit}.",
        )
