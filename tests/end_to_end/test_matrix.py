"""Every family x every operator: function, label, loading, bytes, and what is refused.

The covering test is part of every run. ``pytest -m matrix`` runs the full matrix; what it measured
goes into the file that GROWKIT_MATRIX names, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import growth_matrix
import pytest
import tiny_checkpoints as tiny
import torch
from growth_matrix import (
    ALL_FAMILIES,
    OPERATORS,
    Cell,
    Matrix,
    cells,
    covering,
    families_of,
    full_matrix,
    logits_of,
    pairs,
)
from naive import disagreements
from safetensors.torch import load_file, save_file

from growkit.core.errors import UsageError
from growkit.families import FAMILIES
from growkit.surgery import execute, expand
from growkit.surgery import new_weights as fresh
from growkit.surgery.axis_map import AxisMap

CELLS = covering()
FIRST = [cells(f, op)[0] for f in ALL_FAMILIES for op in OPERATORS if cells(f, op)]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    from growkit.verification.loading import quiet_transformers

    with quiet_transformers():
        yield


# -- the design ------------------------------------------------------------------------------------


def test_the_design_shows_every_pair() -> None:
    """... and is much smaller than the matrix; without any one family it would not."""
    full = full_matrix()
    wanted = set().union(*map(pairs, full))
    assert set().union(*map(pairs, CELLS)) == wanted
    assert set(CELLS) <= set(full) and len(CELLS) < len(full) / 20
    for family in ALL_FAMILIES:
        rest = [cell for cell in CELLS if cell.family != family]
        assert set().union(*map(pairs, rest)) != wanted
    assert {(c.family, c.operator) for c in CELLS} == {(c.family, c.operator) for c in full}


def test_every_family_and_every_operator_is_in_it(matrix: Matrix) -> None:
    """A new family or operator has to join the matrix."""
    from growkit.surgery.operators import OPERATORS as known

    families = set()
    for family in ALL_FAMILIES:
        cell = next(cell for cell in CELLS if cell.family == family)
        config = json.loads((matrix.source(cell)[0] / "config.json").read_text())
        families |= {f.name for f in FAMILIES.values() if config["model_type"] in f.model_types}
    assert families == set(FAMILIES) - VARIANTS
    # Layers in another order are another function (tests/surgery/test_slices.py), and vocabularies
    # need tokenizers (tests/vocabulary).
    elsewhere = {key for key, row in known.items() if row.file in ("slices", "vocabulary")}
    assert set(known) - elsewhere == {
        key for request in OPERATORS.values() for key in request
    } & set(known)


# Attention variants of our own: tests/surgery/test_variant_families.py and
# tests/end_to_end/test_t5_grouped.py have their operators.
VARIANTS = {
    name for name, family in FAMILIES.items() if family.model_types[0].startswith("growkit")
}
REFUSED = [(f, op) for op in OPERATORS for f in ALL_FAMILIES if f not in families_of(op)]


@pytest.mark.parametrize(("family", "operator"), REFUSED)
def test_what_a_family_does_not_allow(matrix: Matrix, family: str, operator: str) -> None:
    """Refused on paper, with a remedy, and nothing written."""
    cell = Cell(family, operator, True, "MHA", False, "float32", "single")
    out = matrix.folder / f"refused {cell.name}"
    with pytest.raises(UsageError) as refused:
        matrix.grow(cell, out)
    assert refused.value.remedy
    assert not out.exists()


# -- the cells -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_label_and_function_agree(matrix: Matrix, cell: Cell) -> None:
    matrix.run(cell).check()


@pytest.mark.parametrize("cell", FIRST, ids=lambda cell: f"{cell.family} {cell.operator}")
def test_streamed_bytes_are_those_of_the_naive_oracle(
    matrix: Matrix, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of a few rows, so that every tensor takes several."""
    for module, name, size in (
        (execute, "INPUT_BYTES", 1 << 9),
        (execute, "COPY_BYTES", 1 << 8),
        (fresh, "BLOCK_ELEMENTS", 1 << 7),
    ):
        monkeypatch.setattr(module, name, size)
    source, out = matrix.source(cell)[0], matrix.folder / "streamed"
    plan = matrix.grow(cell, out, symmetry="even")
    assert disagreements(plan, tiny.read_folder(source), tiny.read_folder(out)) == []


# -- negative controls -----------------------------------------------------------------------------

LLAMA = Cell("llama", "--query-heads x2", False, "GQA", False, "float32", "single")


def test_copies_in_the_wrong_order_are_caught(
    matrix: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiled instead of interleaved, with the proof on paper switched off."""
    from growkit.surgery import compose
    from growkit.surgery.operators import query_heads

    class Tiled(AxisMap):
        @staticmethod
        def grouped(size: int, new_size: int, groups: int) -> AxisMap:
            return AxisMap.tile(size, new_size // size)

    monkeypatch.setattr(query_heads, "AxisMap", Tiled)
    monkeypatch.setattr(compose, "check_links", lambda *arguments: None)
    with pytest.raises(AssertionError):
        matrix.run(LLAMA).check()


def test_a_wrong_share_is_caught(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the function and by the bytes."""
    shares = expand.shares

    def louder(*arguments: Any) -> Any:
        first, *rest = shares(*arguments)
        return [first, *(part * part.dtype.type(1.01) for part in rest)]

    monkeypatch.setattr(expand, "shares", louder)
    plan = matrix.grow(LLAMA, out := matrix.folder / "louder", symmetry="even")
    with pytest.raises(AssertionError):
        matrix.measure(LLAMA, plan, out).check()
    source = tiny.read_folder(matrix.source(LLAMA)[0])
    wrong = disagreements(plan, source, tiny.read_folder(out))
    assert wrong == [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(4)]


@pytest.mark.parametrize("exactness", ["exact", "not-exact"])
def test_a_label_that_does_not_fit_is_caught(matrix: Matrix, exactness: str) -> None:
    cell = replace(LLAMA, operator="--layers, stack" if exactness == "exact" else "--layers +2")
    result = matrix.run(cell)
    result.check()
    with pytest.raises(AssertionError):
        replace(result, exactness=exactness).check()


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_keys_that_do_not_fit_are_caught(matrix: Matrix, tmp_path: Path, change: str) -> None:
    out = tmp_path / "b"
    matrix.grow(LLAMA, out)
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["model.layers.0.other.weight"] = torch.ones(2)
    else:
        tensors[name] = tensors[name][:-1]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    # transformers itself raises for another shape.
    with pytest.raises((AssertionError, RuntimeError)):
        logits_of(out)


# -- the whole matrix ------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_full_matrix(tmp_path: Path, family: str) -> None:
    """Every cell; one line of JSON each, appended, so that the next run begins where this ended."""
    record = Path(os.environ.get("GROWKIT_MATRIX", tmp_path / "matrix.jsonl"))
    lines = record.read_text().splitlines() if record.exists() else []
    done = {Cell(**json.loads(line)["cell"]) for line in lines}
    # Source after source: each is made, used by every operator, and forgotten.
    key = lambda cell: str(replace(cell, operator=""))  # noqa: E731
    groups: dict[str, list[Cell]] = {}
    for cell in (cell for cell in full_matrix() if cell.family == family):
        groups.setdefault(key(cell), []).append(cell)
    wrong: list[tuple[str, str]] = []
    for number, group in enumerate(groups.values()):
        matrix = Matrix(tmp_path / str(number))
        for cell in group:
            if cell in done:
                continue
            try:
                result = matrix.run(cell)
                with record.open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
                result.check()
            except Exception as error:  # the cells after it are of interest all the same
                wrong.append((cell.name, repr(error)))
        growth_matrix.forget(tmp_path / str(number))
    assert not wrong, wrong
