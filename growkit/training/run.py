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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from growkit.errors import CheckpointError, UsageError
from growkit.progress import Progress, Reporter, Silent
from growkit.samples import sample_text
from growkit.training import checkpoints, metrics
from growkit.training.recipe import DataSection, Recipe
from growkit.training.text import Corpus

# What may differ between a run and its continuation; anything else would be another run.
MAY_CHANGE = {
    "out",
    "data.cache_dir",
    "training.max_steps",
    "training.max_tokens",
    "training.logging_steps",
    "training.eval_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.report_to",
    "training.per_device_eval_batch_size",
}
DONE = "growkit_training.json"
DATA = "data.json"


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to. Losses in nats a token; None without held-out text."""

    out: Path
    steps: int
    tokens: int
    parameters: int
    loss: float | None
    eval_loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    seconds: float
    resumed_from: str | None
    metrics: Path
    plot: Path | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def corpus_of(section: DataSection) -> Corpus:
    """The documents that a data section names."""
    return Corpus(
        files=[] if section.files == "sample" else list(section.files),
        text=sample_text() if section.files == "sample" else None,
        text_field=section.text_field,
        eval_fraction=section.eval_fraction,
        eval_files=section.eval_files,
    )


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
    _check_source(recipe, out)
    _prepare_folder(recipe, out, folder, resume, overwrite, reporter)

    from growkit.verify.loading import quiet_transformers

    with quiet_transformers():
        return _run(recipe, corpus, out, folder, resume, reporter, started)


def _check_source(recipe: Recipe, out: Path) -> None:
    source = recipe.model.checkpoint
    if source is None:
        return
    if not source.is_dir():
        raise UsageError(
            f"model.checkpoint {str(source)!r} is not a folder.",
            "Give the path of a checkpoint folder; paths are relative to the current folder.",
        )
    if source.resolve() == out:
        raise UsageError(
            f"The output {str(out)!r} is the checkpoint that the run starts from.",
            "Choose another --out; to go on with an interrupted run, repeat its own command.",
        )


def _prepare_folder(
    recipe: Recipe, out: Path, folder: Path, resume: str, overwrite: bool, reporter: Reporter
) -> None:
    """Make the run folder, or check that the run in it is this one."""
    stored = folder / "recipe.yaml"
    if out.exists() and not out.is_dir():
        raise UsageError(f"The output {str(out)!r} is a file.", "Choose a folder with --out.")
    if stored.is_file() and overwrite:
        shutil.rmtree(folder)
        (out / DONE).unlink(missing_ok=True)
    elif stored.is_file() and not _has_begun(folder):
        # It was refused or killed before its first step: a corrected recipe may have the folder.
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        (folder / DATA).unlink(missing_ok=True)
    elif stored.is_file():
        if resume == "never":
            raise UsageError(
                f"{str(out)!r} holds a run already.",
                "Choose another --out, go on with --resume auto, or begin anew with --overwrite.",
            )
        _check_same(recipe, stored, reporter)
    elif out.is_dir() and any(out.iterdir()):
        raise UsageError(
            f"The output {str(out)!r} is not empty and holds no training run.",
            "Choose another --out.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "checkpoints" / checkpoints.PARTIAL, ignore_errors=True)
    partial = stored.with_name("recipe.yaml.partial")
    partial.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    os.replace(partial, stored)


def _has_begun(folder: Path) -> bool:
    rows = metrics.read_metrics(folder / "metrics.jsonl")
    return bool(rows or checkpoints.list_checkpoints(folder / "checkpoints"))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        return {k: v for key in values for k, v in _flat(values[key], f"{prefix}{key}.").items()}
    return {prefix[:-1]: values}


def _check_same(recipe: Recipe, stored: Path, reporter: Reporter) -> None:
    old, new = _flat(yaml.safe_load(stored.read_text())), _flat(recipe.to_dict())
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    forbidden = [key for key in changed if key not in MAY_CHANGE]
    if forbidden:
        key = forbidden[0]
        raise UsageError(
            f"{str(stored.parent.parent)!r} holds a run of another recipe: {key} was "
            f"{old.get(key)!r} and is {new.get(key)!r}"
            + (f" (and {len(forbidden) - 1} more)." if forbidden[1:] else "."),
            "Choose another --out, or begin anew with --overwrite.",
        )
    if {"training.max_steps", "training.max_tokens"} & set(changed):
        section = recipe.training
        if section.schedule == "cosine":
            reporter.warn(
                "the length of a cosine schedule changed: the learning rate jumps to the new curve"
            )


def _run(
    recipe: Recipe,
    corpus: Corpus,
    out: Path,
    folder: Path,
    resume: str,
    reporter: Reporter,
    started: float,
) -> TrainingResult:
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
    )
    _check_data(folder, packed.folder.name)
    train_set, held_out = datasets(packed, recipe.data.sequence_length, recipe.data.max_eval_tokens)
    checkpoint = _resume_point(folder / "checkpoints", resume, reporter)
    metrics_file = folder / "metrics.jsonl"
    done = out / DONE
    if checkpoint is not None and done.is_file():
        record = json.loads(done.read_text())
        if record["steps"] == checkpoints.step_of(checkpoint) >= recipe.total_steps:
            reporter.note(f"{out} is finished: {record['steps']} steps.")
            return _result(record, out, folder, started, str(checkpoint))
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
        bytes_per_token=packed.eval_bytes_per_token,
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
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": losses[-1] if losses else None,
        **{k: last.get(k) if last else None for k in ("eval_loss", "perplexity", "bits_per_byte")},
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
    )
    return _result(record, out, folder, started, str(checkpoint) if checkpoint else None)


def _result(
    record: dict[str, Any], out: Path, folder: Path, started: float, resumed_from: str | None
) -> TrainingResult:
    plot = folder / "loss.png"
    names = ("steps", "tokens", "parameters", "loss", "eval_loss", "perplexity", "bits_per_byte")
    return TrainingResult(
        out=out,
        **{name: record[name] for name in names},
        seconds=round(time.monotonic() - started, 2),
        resumed_from=resumed_from,
        metrics=folder / "metrics.jsonl",
        plot=plot if plot.is_file() else None,
    )


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


def _check_data(folder: Path, key: str) -> None:
    """Refuse to go on with other data than the run began with."""
    path = folder / DATA
    if path.is_file():
        if json.loads(path.read_text())["packed"] != key:
            raise UsageError(
                f"The data files changed since the run in {str(folder.parent)!r} began.",
                "Put them back, choose another --out, or begin anew with --overwrite.",
            )
    else:
        path.write_text(json.dumps({"packed": key}) + "\n")


def _check_length(model: Any, recipe: Recipe) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and recipe.data.sequence_length > limit:
        raise UsageError(
            f"data.sequence_length is {recipe.data.sequence_length} and the model has positions "
            f"for {limit}.",
            f"Set data.sequence_length to at most {limit}.",
        )


def _resume_point(folder: Path, resume: str, reporter: Reporter) -> Path | None:
    if resume == "never":
        return None
    if resume == "auto":
        newest, skipped = checkpoints.newest_whole(folder)
        for path, reason in skipped:
            reporter.warn(f"{path.name} is damaged ({reason}): skipped")
        if newest is not None:
            reporter.note(f"Going on from {newest.name}.")
        elif skipped:
            reporter.warn("no whole checkpoint is left: the run starts from the beginning")
        return newest
    chosen = Path(resume).resolve()
    problem = checkpoints.damage(chosen) if chosen.is_dir() else "it is not a folder"
    if problem is None and checkpoints.step_of(chosen) < 0:
        problem = "its name is not checkpoint-N"
    if problem is not None:
        raise CheckpointError(
            f"{resume!r} cannot be resumed from: {problem}.",
            "Give a checkpoint-N folder that growkit train wrote, or --resume auto.",
        )
    # Newer checkpoints of this run belong to the branch that is left here.
    for newer in checkpoints.list_checkpoints(folder):
        if checkpoints.step_of(newer) > checkpoints.step_of(chosen):
            superseded = newer.with_name(newer.name + ".superseded")
            shutil.rmtree(superseded, ignore_errors=True)
            newer.rename(superseded)
    return chosen
