"""Every row of the vocabulary, on the stored values: no text reads them all.

With the plan that made B, embeddings, positions and output matrix are compared with what it makes
of A, streamed. Without one, equal shapes are compared row by row with A's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from growkit.checkpoint import Checkpoint
from growkit.diff.explain import explain
from growkit.surgery.plan import Plan
from growkit.verification.layerwise import LayerwiseModel
from growkit.verification.report import TableRows

BLOCK_ROWS = 4096


def rows_by_plan(plan: Plan, grown: Checkpoint, vocab_size: int) -> TableRows:
    """Compare every table outside the layers with what the plan makes of the source."""
    names: list[str] = []
    differing: list[str] = []
    rounded = plan.exactness.value == "rounded"
    for tensor in plan.tensors:
        name, shape = tensor.output.name, tensor.output.shape
        if tensor.layer is not None or len(shape) != 2:
            continue
        figures = explain(plan, tensor, grown)
        names.append(name)
        wrong = figures.beyond_rounding if rounded else figures.differing
        if wrong:
            differing.append(
                f"{name}: {wrong:,} of {figures.entries:,} entries are not what the plan makes of "
                f"A (by up to {figures.max_difference:.3g})"
            )
    return TableRows("plan", vocab_size, vocab_size, tuple(names), tuple(differing))


@dataclass(frozen=True)
class _Table:
    """Rows of one stored matrix, some at a time."""

    shape: tuple[int, ...]
    rows: Callable[[int, int], torch.Tensor]


def rows_of_a(model_a: Any, model_b: Any, read: Iterable[int], vocab_size: int) -> TableRows:
    """Compare the tables of two models that no plan connects.

    Equal shapes: if all rows that the text reads are equal, all others have to be. If those differ
    although the logits agree, B holds them in another form, and no row can be judged by itself.
    Other shapes: a row of zeros that A does not have is wrong.

    Args:
        read: ids of the tokens that both models have computed.
    """
    known = torch.zeros(vocab_size, dtype=torch.bool)
    known[list(read)] = True
    names: list[str] = []
    other: list[str] = []
    zero: list[str] = []
    everywhere = judged = True
    tables_b = _tables(model_b)
    for name, table_a in _tables(model_a).items():
        table_b = tables_b.get(name)
        if table_b is None:
            continue
        names.append(name)
        same = table_a.shape == table_b.shape
        wrong = _wrong_rows(table_a, table_b, by_value=same)
        if len(wrong) == vocab_size:
            everywhere = everywhere and same
            judged = judged and not (same and bool(wrong[known].any()))
        if bool(wrong.any()):
            what = "are not those of A" if same else "are zero, and are not in A"
            sentence = f"{name}: {int(wrong.sum()):,} of {len(wrong):,} rows {what}"
            (other if same else zero).append(sentence)
    if not names or not (judged and everywhere):
        found = zero + other if judged else zero
        return TableRows("", int(known.sum()), vocab_size, tuple(names), tuple(found))
    return TableRows("a", vocab_size, vocab_size, tuple(names), tuple(other))


def _wrong_rows(a: _Table, b: _Table, *, by_value: bool) -> torch.Tensor:
    """Which rows of B differ from A's, or, without ``by_value``, are zero where A's are not."""
    found = []
    for first in range(0, min(a.shape[0], b.shape[0]), BLOCK_ROWS):
        left, right = (table.rows(first, first + BLOCK_ROWS) for table in (a, b))
        if by_value:
            found.append((left != right).any(-1))
        else:
            count = min(len(left), len(right))
            found.append((left[:count] != 0).any(-1) & (right[:count] == 0).all(-1))
    return torch.cat(found)


def _tables(model: Any) -> dict[str, _Table]:
    """Embeddings and output matrix of a model."""
    if isinstance(model, LayerwiseModel):
        names = ("model.embed_tokens.weight", "lm_head.weight")
        return {name: _stored(model, name) for name in names}
    head = model.get_output_embeddings()
    tables: dict[str, Any] = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if module is head or (isinstance(module, nn.Embedding) and not _is_in_a_layer(name))
    }
    return {name: _Table(tuple(m.weight.shape), partial(_rows, m)) for name, m in tables.items()}


def _is_in_a_layer(name: str) -> bool:
    """A number in a module's name: T5 keeps position biases in an embedding of a layer."""
    return any(part.isdigit() for part in name.split("."))


def _rows(module: Any, first: int, end: int) -> torch.Tensor:
    rows: torch.Tensor = module.weight[first:end]
    return rows


def _stored(model: LayerwiseModel, name: str) -> _Table:
    stored = model.stored_name(name)
    assert stored is not None
    file, _, shape = model.folder.tensors[stored]

    def rows(first: int, end: int) -> torch.Tensor:
        with safe_open(file, framework="pt") as tensors:
            block: torch.Tensor = tensors.get_slice(stored)[first : min(end, shape[0])]
        return block.to(model.dtype)

    return _Table(shape, rows)
