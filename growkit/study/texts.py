"""What all runs of a study read: one tokenizer and one text, with the hashes that keys are made of.

The tokenizer is trained once, in the folder of runs, and named after what it was trained on. The
content key of a training run is what its result depends on, and nothing else: finished runs are
found again by their key, so a value that is added to it makes all of them anew. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growkit.checkpoint import content_hash, open_checkpoint
from growkit.core.progress import Reporter
from growkit.core.writing import make_whole
from growkit.data.sources import Corpus, corpus_of
from growkit.study.recipe import Base, Start, StudyRecipe
from growkit.study.shapes import digest
from growkit.training.changes import MAY_CHANGE

FORMAT = 1
# Of the data section: where things are, and how many processes read them. Their content is hashed.
PLACES = ("files", "eval_files", "tokens", "eval_tokens", "cache_dir", "workers")
# These may differ between a run and its continuation, and yet say what the run is.
LENGTH = ("max_steps", "max_tokens")


@dataclass(frozen=True)
class Inputs:
    """The tokenizer's folder (None: every checkpoint has its own) and the hashes by name."""

    tokenizer: Path | None
    fingerprints: dict[str, str]


def open_inputs(
    recipe: StudyRecipe, runs: Path, reporter: Reporter, scratch: Path | None = None
) -> Inputs:
    """Hash what the study reads, and train its tokenizer if it is not there.

    Args:
        scratch: where it is made instead of in ``runs``.

    Raises:
        UsageError, CheckpointError: files or folders that are missing or damaged.
    """
    from growkit.data.tokenizer import tokenizer_fingerprint

    corpus = corpus_of(recipe.data)
    sources = [*corpus.sources, *([corpus.held_out] if corpus.held_out is not None else [])]
    memo = (scratch or runs) / "data" / "hashes.json"
    content = digest([source.content(memo) for source in sources])
    fingerprints = {"data": content}
    for start in [*recipe.bases.values(), *recipe.arms.values()]:
        if start.checkpoint is not None:
            fingerprints[str(start.checkpoint)] = _fingerprint(start.checkpoint)
    tokenizer = _tokenizer(recipe, corpus, (runs, scratch or runs), content, reporter)
    if tokenizer is not None:
        fingerprints["tokenizer"] = tokenizer_fingerprint(tokenizer)
    return Inputs(tokenizer, fingerprints)


def _fingerprint(folder: Path) -> str:
    """Of a checkpoint's weights, config and tokenizer."""
    from growkit.data.tokenizer import tokenizer_fingerprint

    with open_checkpoint(folder) as checkpoint:
        config = digest(checkpoint.config)
        return f"{content_hash(checkpoint)} {config} {tokenizer_fingerprint(folder)}"


def _tokenizer(
    recipe: StudyRecipe,
    corpus: Corpus,
    places: tuple[Path, Path],
    content: str,
    reporter: Reporter,
) -> Path | None:
    """Taken from the first place where it is there, else made in the second."""
    section = recipe.tokenizer
    if section is None:
        return None
    if section.path is not None:
        return section.path.resolve()
    size = section.train_bpe or 257
    name = digest([content, size, recipe.data.eval_fraction])
    there, target = (place / "tokenizers" / name for place in places)
    if there.is_dir():
        return there

    def make(folder: Path) -> None:
        from growkit.data.tokenizer import train_bpe

        if section.train_bpe:
            reporter.note(f"Training a BPE tokenizer of {size} tokens on the training text.")
        train_bpe(corpus.train_documents(), size, folder)

    return make_whole(target, make)


def content_key(
    recipe: Mapping[str, Any],
    start: Start,
    study: StudyRecipe,
    fingerprints: Mapping[str, str],
    parent: str | None,
) -> str:
    """A hash of all that the result of a run depends on; intervals of logging and places do not.

    The sources of a mixture are hashed with the paths that the recipe gives them (as the name that
    a source has), so a mixture under other paths is made again.

    Args:
        recipe: of the training run.
        fingerprints: of data, tokenizer and checkpoints (:mod:`growkit.study.texts`).
        parent: key of the run that this one continues from.
    """
    training = {
        key: value
        for key, value in recipe["training"].items()
        if f"training.{key}" not in MAY_CHANGE or key in LENGTH
    }
    training.pop("use_cpu", None)
    if start.checkpoint is not None:
        parent = fingerprints[str(start.checkpoint)]
    return digest(
        {
            **_observed(start, study),
            "format": FORMAT,
            "model": recipe["model"],
            "data": {key: value for key, value in recipe["data"].items() if key not in PLACES},
            "training": training,
            "position": recipe.get("position"),
            "content": fingerprints["data"],
            "tokenizer": fingerprints.get("tokenizer"),
            "change": start.change,
            "parent": parent,
        }
    )


def _observed(start: Start, study: StudyRecipe) -> dict[str, list[str]]:
    """Figures besides the loss belong to the result of an arm: a run without them is another."""
    if isinstance(start, Base):
        return {}
    asked: dict[str, list[str]] = {"measures": [*study.measures], "series": [*study.series]}
    return {name: value for name, value in asked.items() if value}
