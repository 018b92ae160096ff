"""What a run reads: its tokenizer, the tokens of its data, and how much of each source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import GrowkitError
from growkit.core.progress import Reporter
from growkit.data.packing import PackedDataset
from growkit.data.sources import Corpus
from growkit.training.data_position import begin_of, sample_order
from growkit.training.leftovers import remove
from growkit.training.recipe import Recipe

if TYPE_CHECKING:
    from growkit.data.packing import PackedDataset
    from growkit.training.parallel.processes import Processes


# Muennighoff et al. 2023, "Scaling Data-Constrained Language Models" (arXiv:2305.16264): up to
# about four epochs are nearly as good as new text, beyond that the return falls off.
MANY_EPOCHS = 4


def data_use(recipe: Recipe, dataset: PackedDataset, steps: int) -> dict[str, dict[str, Any]]:
    """Tokens and epochs of each source after so many steps."""
    order = sample_order(recipe, dataset)
    read = order.read(steps * recipe.sequences_per_step)
    return {
        stream.name: {
            "tokens": count * dataset.length,
            "available_tokens": size * dataset.length,
            "epochs": round(count / size, 4),
        }
        for stream, size, count in zip(dataset.streams, dataset.sizes, read, strict=True)
    }


def warn_of_repeats(recipe: Recipe, dataset: PackedDataset, reporter: Reporter) -> None:
    """Say which sources the run will read more than about four times."""
    for name, use in data_use(recipe, dataset, recipe.total_steps).items():
        if use["epochs"] > MANY_EPOCHS:
            of = "the training text" if len(dataset.streams) == 1 else f"source {name!r}"
            reporter.warn(
                f"{of} is read {use['epochs']:.1f} times: beyond about {MANY_EPOCHS} epochs "
                "repeated text helps little (arXiv:2305.16264)"
            )


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

    from growkit.data.packing import PackedText, datasets, pack
    from growkit.data.tokenizer import load_tokenizer, tokenizer_fingerprint

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
            vocabulary=model_vocabulary(recipe, tokenizer),
        )

    made = processes.from_first(lambda: tokens().key)
    packed = tokens()
    if packed.key != made:
        raise GrowkitError(
            f"Process {processes.rank} reads other data files than the first process.",
            "Give all machines the same files under the same paths.",
        )
    train_set, held_out = datasets(packed, recipe.data)
    begin = processes.from_first(lambda: begin_of(recipe, folder, train_set, packed.key, reporter))
    train_set.begin = begin.begin
    train_set.places = [stored.place() for stored in begin.places] or None
    warn_of_repeats(recipe, train_set, reporter)
    return train_set, held_out, tokenizer, tokenizer_folder


def model_vocabulary(recipe: Recipe, tokenizer: Any) -> int:
    """How many token ids the run's model knows; the tokenizer's where its config does not say."""
    config: Mapping[str, Any] = recipe.model.config or {}
    if recipe.model.checkpoint is not None:
        with open_checkpoint(recipe.model.checkpoint) as checkpoint:
            config = checkpoint.config
    size = config.get("vocab_size")
    return size if type(size) is int and size > 0 else len(tokenizer)


def _tokenizer_folder(recipe: Recipe, corpus: Corpus, folder: Path, reporter: Reporter) -> Path:
    """The folder that holds the tokenizer; a trained one is trained now, once."""
    from growkit.data.tokenizer import train_bpe, with_template

    if recipe.tokenizer_folder is not None:
        if recipe.data.chat_template is None:
            return recipe.tokenizer_folder
        return with_template(
            recipe.tokenizer_folder, recipe.data.chat_template, folder / "tokenizer"
        )
    section = recipe.tokenizer
    assert section is not None  # the recipe has a tokenizer or a checkpoint
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
