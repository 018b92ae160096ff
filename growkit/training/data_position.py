"""Where a run stands in its data, and where a run that starts from its folder goes on.

``data_position.json`` lies beside the weights of every checkpoint and of the final model; growth
and conversion copy it along. A run that starts from such a folder and reads the same text (also
with more appended to it) goes on behind what was read, in the same order, whatever its own seed,
batch or mixture; ``data.start: beginning`` says otherwise. Where a run began stands in its
``training/data.json``, so that resuming needs nothing else.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, model_validator

from growkit.core.errors import CheckpointError, UsageError
from growkit.core.progress import Reporter
from growkit.core.quantities import counted
from growkit.core.records import read_record
from growkit.core.writing import write_whole
from growkit.data.order import SampleOrder, SourcePlace
from growkit.training import checkpoints
from growkit.training.change_point import stored_change
from growkit.training.parallel.launch import train_command
from growkit.training.recipe import Recipe
from growkit.training.run_files import Count, RunFile

if TYPE_CHECKING:
    from growkit.data.packing import PackedDataset

POSITION, DATA = "data_position.json", "data.json"
# Sequences of a source that are compared to know it again.
COMPARED = 64


class StoredPlace(RunFile):
    """A :class:`SourcePlace` in a file; ``digest`` is of its tokens, as it was last."""

    seed: int = Field(ge=0, lt=2**32)
    number: int = Field(ge=0, lt=2**31)
    read: int = Count
    sizes: list[list[int]] = Field(min_length=1, max_length=1000)
    digest: str = ""

    @model_validator(mode="after")
    def _rising(self) -> StoredPlace:
        pairs = all(len(pair) == 2 and pair[0] >= 0 and pair[1] > 0 for pair in self.sizes)
        if not pairs or self.sizes[0][0] != 0 or self.sizes != sorted(self.sizes):
            raise ValueError("sizes are not pairs (samples read, sequences) that rise from 0")
        return self

    def place(self) -> SourcePlace:
        return SourcePlace(self.seed, self.number, self.read, tuple((k, n) for k, n in self.sizes))

    @classmethod
    def of(cls, place: SourcePlace, digest: str) -> StoredPlace:
        sizes = [list(pair) for pair in place.sizes]
        return cls(
            seed=place.seed, number=place.number, read=place.read, sizes=sizes, digest=digest
        )


class DataPosition(RunFile):
    """``data_position.json``: the place of each source, by its name."""

    sequence_length: int = Count
    sources: dict[str, StoredPlace]


class DataBegin(RunFile):
    """``training/data.json``: what a run reads.

    Attributes:
        packed: hash of its tokens and their split.
        begin: samples of the run before it took up ``places``: 0, but of a change point.
        places: where its sources stood then, in their order; empty: at their beginning.
    """

    packed: str
    begin: int = Field(default=0, ge=0, lt=1 << 63)
    places: list[StoredPlace] = Field(default_factory=list)


def sample_order(recipe: Recipe, dataset: PackedDataset) -> SampleOrder:
    """The order of the samples of a run."""
    return SampleOrder(
        dataset.sizes,
        recipe.training.seed,
        [source.weights for source in recipe.data.sources],
        recipe.total_steps * recipe.sequences_per_step,
        places=dataset.places,
        begin=dataset.begin,
    )


def position_text(recipe: Recipe, dataset: PackedDataset, steps: int) -> str:
    """The content of ``data_position.json`` after so many steps of the whole run."""
    places = sample_order(recipe, dataset).places(steps * recipe.sequences_per_step)
    sources = {
        stream.name: StoredPlace.of(place, _digest(dataset, i, dataset.sizes[i]))
        for i, (stream, place) in enumerate(zip(dataset.streams, places, strict=True))
    }
    position = DataPosition(sequence_length=dataset.length, sources=sources)
    return json.dumps(position.model_dump(), indent=2) + "\n"


def _digest(dataset: PackedDataset, source: int, sequences: int) -> str:
    """A hash of some of the first ``sequences`` of a source, spread over all of them."""
    content = hashlib.blake2b(digest_size=16)
    stream, length = dataset.streams[source], dataset.length
    for number in np.unique(np.linspace(0, sequences - 1, COMPARED).astype(np.int64)).tolist():
        content.update(stream.tokens(number * length, (number + 1) * length).tobytes())
    return content.hexdigest()


def stored_position(folder: Path) -> DataPosition | None:
    """The position beside the weights in a folder; None where there is none that can be read."""
    path = folder / POSITION
    try:
        return read_record(path, DataPosition) if path.is_file() else None
    except CheckpointError:
        return None


def _taken_up(
    position: DataPosition | None, recipe: Recipe, dataset: PackedDataset
) -> tuple[list[StoredPlace], list[str]]:
    """The place of every source, and the names of those that go on; the others begin."""
    stored = position.sources if position and position.sequence_length == dataset.length else {}
    free = 1 + max((place.number for place in stored.values()), default=-1)
    places, known = [], []
    for i, (stream, n) in enumerate(zip(dataset.streams, dataset.sizes, strict=True)):
        found = stored.get(stream.name)
        before = found.sizes[-1][1] if found else 0
        if found and before <= n and _digest(dataset, i, before) == found.digest:
            sizes = [*found.sizes, *([[found.read, n]] if n > before else [])]
            places.append(found.model_copy(update={"sizes": sizes}))
            known.append(stream.name)
        else:
            new = SourcePlace(recipe.training.seed, free + i, 0, ((0, n),))
            places.append(StoredPlace.of(new, ""))
    return places, known


def begin_of(
    recipe: Recipe, folder: Path, dataset: PackedDataset, packed: str, reporter: Reporter
) -> DataBegin:
    """Where the run begins to read: decided and stored before its first step, read afterwards.

    Args:
        folder: of the run, ``OUT/training``.
        packed: hash of its tokens.

    Raises:
        UsageError: the data are not those that the run began with, or not those before a change
            point with more appended.
    """
    path = folder / DATA
    if not path.exists():
        begin = _first(recipe, folder, dataset, packed, reporter)
        write_whole(path, json.dumps(begin.model_dump(exclude_defaults=True)) + "\n")
    begin = read_record(path, DataBegin)
    if begin.packed != packed:
        raise UsageError(
            f"The data files changed since the run in {str(folder.parent)!r} began.",
            "Put them back, choose another --out, or begin anew with --overwrite."
            + _appended(recipe, folder, dataset),
        )
    return begin


def _appended(recipe: Recipe, folder: Path, dataset: PackedDataset) -> str:
    """The command that goes on with appended data, where they are no other change."""
    newest = checkpoints.newest_whole(folder / "checkpoints", contents=False)[0]
    if newest is None or recipe.position is not None:
        return ""
    position = stored_position(newest)
    known = _taken_up(position, recipe, dataset)[1]
    if position is None or not position.sources.keys() <= {*known}:
        return ""
    out = folder.parent.with_name(f"{folder.parent.name}-from-{checkpoints.step_of(newest)}")
    return f" To go on with what was appended: {train_command(out, resume=newest)}"


def _first(
    recipe: Recipe, folder: Path, dataset: PackedDataset, packed: str, reporter: Reporter
) -> DataBegin:
    point, source = stored_change(folder), recipe.model.checkpoint
    if point is not None:
        return _behind_a_change(recipe, folder, dataset, packed, reporter)
    if recipe.data.start == "beginning":
        return DataBegin(packed=packed)
    if recipe.position is not None and recipe.position.stage:
        # The stages of a run read on, each from where the one before ended.
        stage = folder.parents[1] / "0" / "training" / DATA
        return read_record(stage, DataBegin).model_copy(update={"packed": packed})
    if source is None:
        return DataBegin(packed=packed)
    position = stored_position(source)
    places, known = _taken_up(position, recipe, dataset)
    if not known:
        if position is not None:
            reporter.note(f"The data are not those of {source}: they are read from the beginning.")
        return DataBegin(packed=packed)
    read = sum(place.read for place in places)
    reporter.note(
        f"The data go on behind the {counted(read, 'sample')} that {source} was trained on; "
        "data.start: beginning reads them again."
    )
    return DataBegin(packed=packed, places=places)


def _behind_a_change(
    recipe: Recipe, folder: Path, dataset: PackedDataset, packed: str, reporter: Reporter
) -> DataBegin:
    point = stored_change(folder)
    assert point is not None
    position = stored_position(Path(point.checkpoint))
    places, known = _taken_up(position, recipe, dataset)
    stored = point.run / DATA
    before = read_record(stored, DataBegin) if stored.is_file() else None
    if before is not None and before.packed == packed and position is None:  # of an older growkit
        return before
    if position is None or not {*known} >= position.sources.keys() & {
        stream.name for stream in dataset.streams
    }:
        raise UsageError(
            f"The data files changed since the run in {str(point.run.parent)!r} began, by more "
            "than text that was appended.",
            "Put them back (new files have to come after the old ones), or start from the weights "
            "with model.checkpoint.",
        )
    for stream, place in zip(dataset.streams, places, strict=True):
        if len(place.sizes) > 1 and place.sizes[-1][0] == place.read:
            reporter.note(
                f"Source {stream.name!r} has {place.sizes[-1][1]:,} sequences instead of "
                f"{place.sizes[-2][1]:,}: the new ones join what was not read yet."
            )
    return DataBegin(packed=packed, begin=point.step * recipe.sequences_per_step, places=places)
