"""What a run reads: its tokenizer, and the tokens of its data, made once by the first process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.errors import GrowkitError
from growkit.progress import Reporter
from growkit.training.leftovers import remove
from growkit.training.recipe import Recipe
from growkit.training.run_folder import check_data
from growkit.training.sources import Corpus

if TYPE_CHECKING:
    from growkit.training.packing import PackedDataset
    from growkit.training.processes import Processes


def run_inputs(
    recipe: Recipe,
    corpus: Corpus,
    folder: Path,
    processes: Processes,
    reporter: Reporter,
) -> tuple[PackedDataset, PackedDataset | None, Any, Path]:
    """Training and held-out sequences, tokenizer and its folder.

    The first process makes what is missing, all read it.

    Args:
        folder: of the run, ``OUT/training``.

    Raises:
        UsageError: the data do not fit the recipe, or are not those that the run began with.
        GrowkitError: the processes read different data.
    """
    from growkit.training.data_use import warn_of_repeats
    from growkit.training.packing import PackedText, datasets, pack
    from growkit.training.tokenizer import load_tokenizer, tokenizer_fingerprint

    tokenizer_folder = processes.from_first(
        lambda: _tokenizer_folder(recipe, corpus, folder, reporter)
    )
    tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=recipe.model.trust_remote_code)
    fingerprint = tokenizer_fingerprint(tokenizer_folder)
    cache = recipe.data.cache_dir or folder / "data"

    def tokens() -> PackedText:
        return pack(
            corpus,
            tokenizer,
            fingerprint,
            cache,
            reporter,
            workers=recipe.data.workers,
        )

    made = processes.from_first(lambda: tokens().key)
    packed = tokens()
    if packed.key != made:
        raise GrowkitError(
            f"Process {processes.rank} reads other data files than the first process.",
            "Give all machines the same files under the same paths.",
        )
    processes.from_first(lambda: check_data(folder, packed.key))
    train_set, held_out = datasets(packed, recipe.data)
    warn_of_repeats(recipe, train_set, reporter)
    return train_set, held_out, tokenizer, tokenizer_folder


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
        remove(partial)
        size = section.train_bpe or 257
        if section.train_bpe:
            reporter.note(f"Training a BPE tokenizer of {size} tokens on the training text.")
        train_bpe(corpus.train_documents(), size, partial)
        remove(target)
        partial.rename(target)
    return target
