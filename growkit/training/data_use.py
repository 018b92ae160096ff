"""How much of each source a run reads: its sample order, its epochs, and a word about repeats."""

from __future__ import annotations

from typing import Any

from growkit.progress import Reporter
from growkit.training.order import SampleOrder
from growkit.training.packing import PackedDataset
from growkit.training.recipe import Recipe

# Muennighoff et al. 2023, "Scaling Data-Constrained Language Models" (arXiv 2305.16264): up to
# about four epochs are nearly as good as new text, beyond that the return falls off.
MANY_EPOCHS = 4


def sample_order(recipe: Recipe, dataset: PackedDataset) -> SampleOrder:
    """The order of the samples of a run."""
    return SampleOrder(
        dataset.sizes,
        recipe.training.seed,
        [source.weights for source in recipe.data.sources],
        recipe.total_steps * recipe.sequences_per_step,
    )


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
                "repeated text helps little (arXiv 2305.16264)"
            )
