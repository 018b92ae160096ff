"""Fingerprints: blind to the split into files, sensitive to everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from checkpoint_files import Tensors, make_tensors

from growkit.checkpoint import content_hash, identity, open_checkpoint

Make = Callable[..., Path]


class Bar:
    total = 0.0

    def advance(self, amount: float) -> None:
        self.total += amount


def _fingerprints(folder: Path) -> tuple[str, str, str]:
    with open_checkpoint(folder) as checkpoint:
        found = identity(checkpoint)
        return found["config_sha256"], found["headers_sha256"], content_hash(checkpoint)


def test_sharding_does_not_matter(make_checkpoint: Make) -> None:
    assert _fingerprints(make_checkpoint("one")) == _fingerprints(
        make_checkpoint("two", sharded=True)
    )


def test_config_bytes_matter(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    before = _fingerprints(folder)
    with open(folder / "config.json", "a") as file:
        file.write(" ")
    after = _fingerprints(folder)
    assert before[0] != after[0]
    assert before[1:] == after[1:]


def test_one_bit_matters_to_the_content_only(make_checkpoint: Make) -> None:
    changed = make_tensors()
    changed["ids"][1] ^= 1
    first = _fingerprints(make_checkpoint("one"))
    second = _fingerprints(make_checkpoint("two", tensors=changed))
    assert first[1] == second[1]
    assert first[2] != second[2]


def test_name_shape_and_type_matter(make_checkpoint: Make) -> None:
    zero = np.zeros((2, 2), np.float32)
    variants: list[Tensors] = [
        {"a": zero, "b": zero},
        {"a": zero, "c": zero},
        {"a": zero, "b": zero.reshape(4)},
        {"a": zero, "b": zero.view(np.int32)},
        {"a": np.zeros((4, 2), np.float32), "b": np.zeros((0, 2), np.float32)},
    ]
    found = [
        _fingerprints(make_checkpoint(f"c{number}", tensors=tensors))
        for number, tensors in enumerate(variants)
    ]
    assert len({headers for _, headers, _ in found}) == len(variants)
    assert len({content for _, _, content in found}) == len(variants)


def test_progress_counts_every_byte(make_checkpoint: Make) -> None:
    tensors = {"a": np.zeros(9_000_001, np.uint8), "b": np.zeros((), np.float32)}
    with open_checkpoint(make_checkpoint(tensors=tensors)) as checkpoint:
        bar = Bar()
        content_hash(checkpoint, bar)
        assert bar.total == checkpoint.total_size
