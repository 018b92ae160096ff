"""What all runs of a study read: one tokenizer and one text, with the hashes that keys are made of.

The tokenizer is trained once, in the folder of runs, and named after what it was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from growkit.checkpoint import content_hash, open_checkpoint
from growkit.core.progress import Reporter
from growkit.core.whole_file import make_whole
from growkit.data.sources import Corpus, corpus_of
from growkit.study.recipe import StudyRecipe
from growkit.study.shapes import digest


@dataclass(frozen=True)
class Inputs:
    """The tokenizer's folder (None: every checkpoint has its own) and the hashes by name."""

    tokenizer: Path | None
    fingerprints: dict[str, str]


def open_inputs(recipe: StudyRecipe, runs: Path, reporter: Reporter) -> Inputs:
    """Hash what the study reads, and train its tokenizer if it is not there.

    Raises:
        UsageError, CheckpointError: files or folders that are missing or damaged.
    """
    from growkit.data.tokenizer import tokenizer_fingerprint

    corpus = corpus_of(recipe.data)
    sources = [*corpus.sources, *([corpus.held_out] if corpus.held_out is not None else [])]
    memo = runs / "data" / "hashes.json"
    content = digest([source.content(memo) for source in sources])
    fingerprints = {"data": content}
    for start in [*recipe.bases.values(), *recipe.arms.values()]:
        if start.checkpoint is not None:
            fingerprints[str(start.checkpoint)] = _fingerprint(start.checkpoint)
    tokenizer = _tokenizer(recipe, corpus, runs, content, reporter)
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
    recipe: StudyRecipe, corpus: Corpus, runs: Path, content: str, reporter: Reporter
) -> Path | None:
    section = recipe.tokenizer
    if section is None:
        return None
    if section.path is not None:
        return section.path.resolve()
    size = section.train_bpe or 257
    target = runs / "tokenizers" / digest([content, size, recipe.data.eval_fraction])

    def make(folder: Path) -> None:
        from growkit.data.tokenizer import train_bpe

        if section.train_bpe:
            reporter.note(f"Training a BPE tokenizer of {size} tokens on the training text.")
        train_bpe(corpus.train_documents(), size, folder)

    return make_whole(target, make)
