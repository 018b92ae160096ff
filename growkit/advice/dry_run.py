"""What a training run would be: everything that can be checked and counted without writing.

The checks are those that the run itself makes before its first step; tokens are estimated from a
sample of the text, because counting them would be the tokenizing itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from growkit.advice.facts import facts_of_recipe, launched, one_pass
from growkit.advice.memory import Memory, Shape, TrainingSetup, training_memory
from growkit.advice.new_run import TextSize, text_size
from growkit.checkpoint import open_checkpoint
from growkit.core.errors import GrowkitError, UsageError
from growkit.core.progress import Reporter
from growkit.data.sources import Corpus, corpus_of
from growkit.data.tokenizer import load_tokenizer, train_bpe
from growkit.training.growth.grown import new_parameters_of
from growkit.training.growth.rehearsal import rehearse
from growkit.training.parallel.launch import check_launch, check_shares
from growkit.training.recipe import Recipe
from growkit.training.run_folder import check_source, look_into
from growkit.training.trackers import check_trackers


@dataclass(frozen=True)
class DryRun:
    """A run on paper.

    Attributes:
        out: what the run would do with its folder, in words.
        text: estimated from a sample.
        held_out_tokens: estimated; 0 where nothing is held out of the training text.
        passes: over the text, estimated.
        shapes: of the model's parameters.
    """

    recipe: Recipe
    out: str
    text: TextSize
    held_out_tokens: int
    passes: float
    shapes: Mapping[str, Shape]
    memory: Memory

    @property
    def parameters(self) -> int:
        """Of the model at the run's beginning."""
        return sum(prod(shape) for shape in self.shapes.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        recipe = self.recipe
        return {
            "out": self.out,
            "parameters": self.parameters,
            "text": asdict(self.text),
            "held_out_tokens": self.held_out_tokens,
            "steps": recipe.total_steps,
            "tokens_per_step": recipe.tokens_per_step,
            "tokens": recipe.total_steps * recipe.tokens_per_step,
            "passes": round(self.passes, 4),
            "memory_per_process": self.memory.to_dict(),
            "recipe": recipe.to_dict(),
        }


def dry_run(
    recipe: Recipe, out: Path, *, resume: str, overwrite: bool, reporter: Reporter
) -> DryRun:
    """Check a recipe and count what its run would come to; nothing is written.

    Raises:
        UsageError, CheckpointError, GrowkitError: what the run would raise before its first step.
    """
    if recipe.parallel.processes is None or "WORLD_SIZE" in os.environ:
        check_launch(recipe)
    else:  # the launch that is planned: it has those
        check_shares(recipe, recipe.parallel.processes)
    corpus = corpus_of(recipe.data)
    check_source(recipe, out.resolve())
    new_parameters_of(recipe)
    if recipe.stages:
        rehearse(recipe)
    place = look_into(recipe, out.resolve(), resume, overwrite, reporter)
    check_trackers(recipe.training.report_to)
    with _tokenizer_of(recipe, corpus) as folder:
        tokenizer = load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)
        plain_bytes = recipe.tokenizer is not None and recipe.tokenizer.bytes
        text = text_size(corpus, None if plain_bytes else folder, len(tokenizer))
        shapes, setup = _model(recipe, tokenizer)
    length = recipe.data.sequence_length
    part = recipe.data.eval_fraction if not recipe.data.holds_out_files else 0.0
    held_out, train = round(part * text.tokens), round((1 - part) * text.tokens)
    if all(source.dataset is None for source in corpus.sources):
        _check_length("training", train, length)
        if part:
            _check_length("held-out", held_out, length)
    read = recipe.total_steps * recipe.tokens_per_step
    return DryRun(
        recipe=recipe,
        out=place,
        text=text,
        held_out_tokens=held_out,
        passes=read / max(train, 1),
        shapes=shapes,
        memory=training_memory(shapes, new_parameters_of(recipe), setup),
    )


def _check_length(what: str, tokens: int, length: int) -> None:
    if tokens < length:
        raise UsageError(
            f"The {what} text has about {tokens:,} tokens, less than one sequence of {length:,}.",
            "Give more text, or a smaller data.sequence_length.",
        )


@contextmanager
def _tokenizer_of(recipe: Recipe, corpus: Corpus) -> Iterator[Path]:
    """Its folder; one that the run would train is trained in a folder that goes away."""
    if recipe.tokenizer_folder is not None:
        yield recipe.tokenizer_folder
    else:
        section = recipe.tokenizer
        assert section is not None  # the recipe has a tokenizer or a checkpoint
        with TemporaryDirectory(prefix="growkit-dry-run-") as place:
            train_bpe(corpus.train_documents(), section.train_bpe or 257, Path(place))
            yield Path(place)


def _model(recipe: Recipe, tokenizer: Any) -> tuple[dict[str, Shape], TrainingSetup]:
    """Shapes of the parameters, and how they are trained."""
    from growkit.training.models import check_folder, make_config

    source = recipe.model.checkpoint
    if source is None:
        import torch
        from transformers import AutoModelForCausalLM

        from growkit.verification.loading import quiet_transformers, register_own_models

        register_own_models()
        config = make_config(dict(recipe.model.config or {}), tokenizer)
        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        _check_context(getattr(config, "max_position_embeddings", None), recipe)
        return {name: tuple(p.shape) for name, p in model.named_parameters()}, _setup(recipe)
    check_folder(source)
    with open_checkpoint(source) as checkpoint:
        _check_context(checkpoint.config.get("max_position_embeddings"), recipe)
        rows = checkpoint.config.get("vocab_size")
        if isinstance(rows, int) and len(tokenizer) > rows:
            raise UsageError(
                f"The tokenizer has {len(tokenizer):,} tokens and the model's vocabulary {rows:,}.",
                "Use the model's own tokenizer.",
            )
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    try:
        facts = facts_of_recipe(recipe)
    except GrowkitError:
        facts = None
    return shapes, facts.setup if facts is not None else _setup(recipe)


def _setup(recipe: Recipe) -> TrainingSetup:
    section, parallel = recipe.training, recipe.parallel
    return TrainingSetup(
        dtype="float32" if recipe.model.dtype == "auto" else recipe.model.dtype,
        optimizer=section.optimizer,
        bf16_autocast=section.bf16,
        strategy=parallel.strategy,
        processes=parallel.processes or launched(),
        tensor=parallel.tensor,
        context=parallel.context,
        new_only=section.train == "new",
        **one_pass(recipe, parallel.readers(parallel.processes or launched())),
    )


def _check_context(limit: Any, recipe: Recipe) -> None:
    length = recipe.data.sequence_length
    if isinstance(limit, int) and length > limit:
        raise UsageError(
            f"data.sequence_length is {length} and the model has positions for {limit}.",
            f"Set data.sequence_length to at most {limit}.",
        )
