"""What is compared on the stored values: rows of the vocabulary and config fields.

Every row of the vocabulary, on the stored values: no text reads them all.

With the plan that made B, embeddings, positions and output matrix are compared with what it makes
of A, streamed. Without one, equal shapes are compared row by row with A's own.

Config fields of B against what the plan writes, or against A's own: for what no text shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from growkit.checkpoint import Checkpoint
from growkit.core.errors import GrowkitError
from growkit.diff.explain import explain
from growkit.families import family_of
from growkit.surgery.plan import Plan
from growkit.verification.layerwise import LayerwiseModel
from growkit.verification.report import ConfigFields, TableRows
from growkit.verification.written_folder import Folder

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


# What no forward pass reads.
BOOKKEEPING = frozenset(
    (
        *("growkit", "auto_map", "architectures", "transformers_version", "torch_dtype", "dtype"),
        *("_name_or_path", "name_or_path", "model_type", "use_cache", "task_specific_params"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "id2label", "label2id"),
        *("initializer_range", "init_std", "initializer_factor", "num_labels", "problem_type"),
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"),
        *("dropout", "activation_dropout", "dropout_rate", "layerdrop", "classifier_dropout"),
        *("return_dict", "output_hidden_states", "output_attentions", "output_router_logits"),
        *("chunk_size_feed_forward", "pretraining_tp", "router_aux_loss_coef"),
        "_attn_implementation",
    )
)
ABSENT = "absent"


def compare_configs(
    a: Folder, b: Folder, config_a: Any, config_b: Any, plan: Plan | None
) -> ConfigFields:
    """Every field that a forward pass may read and that growth had no reason to change.

    Args:
        config_a, config_b: as transformers has them, with what the class assumes.
        plan: that made B from A, if it is known.
    """
    if plan is not None:
        expected = dict(plan.config)
        try:  # as the class reads it, so that a default that is spelled out is no difference
            expected = type(config_b).from_dict(expected).to_dict()
            found = config_b.to_dict()
        except Exception:  # a class of other keys (Motif): what lies on disk has to be equal
            found = dict(b.config)
        return ConfigFields("plan", tuple(_differences(expected, found, frozenset())))
    if config_a.model_type != config_b.model_type:
        return ConfigFields("")
    left, right = config_a.to_dict(), config_b.to_dict()
    return ConfigFields("a", tuple(_differences(left, right, _size_fields(a, left, right))))


def _differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], free: frozenset[str], part: str = ""
) -> list[str]:
    """Sentences on fields that differ; those of the parts of a wrapper one by one."""
    differing = []
    for name in dict.fromkeys([*expected, *found]):
        left, right = expected.get(name, ABSENT), found.get(name, ABSENT)
        if name in BOOKKEEPING | free or found.get(name) == expected.get(name):
            continue
        if name.endswith("_config") and isinstance(left, Mapping) and isinstance(right, Mapping):
            differing += _differences(left, right, free, f"{part}{name}.")
        else:
            differing.append(f"{part}{name} is {right!r} instead of {left!r}")
    return differing


def _size_fields(a: Folder, left: Mapping[str, Any], right: Mapping[str, Any]) -> frozenset[str]:
    """Fields that hold sizes, and lists with one entry per layer where the depths differ."""
    free = {"head_dim", "hidden_size", "intermediate_size", "num_hidden_layers"}
    try:
        family = family_of(a.config, a.tensors)
        free |= set(family.config_fields(family.sizes_of(a.config, a.tensors)))
        free |= set(family.layer_counts)
        per_layer = family.per_layer_fields
    except (GrowkitError, KeyError, TypeError, ValueError):
        per_layer = ("layer_types",)
    return frozenset(
        free
        | {
            name
            for name in per_layer
            if isinstance(left.get(name), list)
            and isinstance(right.get(name), list)
            and len(left[name]) != len(right[name])
        }
    )
